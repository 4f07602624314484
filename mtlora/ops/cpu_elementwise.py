"""A backbone's elementwise operations in compiled code (`csrc/elementwise.cpp`), each in one pass over memory.

Tensors are float32 or bfloat16, the same dtype within a call; arithmetic is in float32.

Shape suffixes: R rows (all leading dimensions), d their size, W = 2*d, M matrices, L positions, V vocabulary, N masks,
U = ceil(V/32) words of a mask.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from mtlora.ops.cpu_kernel import ISA, KERNEL_DTYPES, kernel_part

# Version of `ElementwiseCall`, `mtlora_elementwise_layout` in the kernel's source.
LAYOUT = 3

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class ElementwiseCall(ctypes.Structure):
    """One call's sizes and tensors; mirrors `ElementwiseCall` in the kernel's source."""

    _fields_ = (
        ("rows", _LONG),
        ("size", _LONG),
        ("number", _FLOAT),
        ("dtype", _INT),
        ("threads", _INT),
        ("isa", _INT),
        ("first", _ADDRESS),
        ("second", _ADDRESS),
        ("third", _ADDRESS),
        ("inverse", _ADDRESS),
        ("out", _ADDRESS),
        ("also_out", _ADDRESS),
    )


@cache
def _library() -> Any:
    library = kernel_part("elementwise", LAYOUT)
    if library is not None:
        sizes, number, how = [_LONG, _LONG], [_FLOAT], [_INT, _INT, _INT]
        library.mtlora_norm.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, *sizes, *number, *how]
        library.mtlora_add_rms_norm.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, *sizes, *number, *how]
        library.mtlora_silu_and_mul.argtypes = [_ADDRESS, _ADDRESS, *sizes, *how]
        library.mtlora_mask.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, _LONG, *sizes, _INT]
    return library


def runs(*tensors: torch.Tensor) -> bool:
    """Whether the operations support these tensors on this machine."""
    dtype = tensors[0].dtype
    alike = all(tensor.dtype is dtype and tensor.is_cpu for tensor in tensors)
    return alike and dtype in KERNEL_DTYPES and _library() is not None


def rms_norm(
    x_Rd: torch.Tensor, weight_d: torch.Tensor, epsilon: float, isa: int = ISA
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight * x / sqrt(mean x^2 + epsilon) over the last dimension, and 1 / sqrt(...) [rows] in float32 for later."""
    out_Rd = torch.empty(x_Rd.shape, dtype=x_Rd.dtype)
    inverse_R = torch.empty(x_Rd.shape[:-1], dtype=torch.float32)
    _run("mtlora_rms_norm", epsilon, isa, first=x_Rd, second=weight_d, inverse=inverse_R, out=out_Rd)
    return out_Rd, inverse_R


def rms_norm_backward(
    grad_Rd: torch.Tensor, x_Rd: torch.Tensor, weight_d: torch.Tensor, inverse_R: torch.Tensor, isa: int = ISA
) -> torch.Tensor:
    """The gradient of `rms_norm`'s x."""
    out_Rd = torch.empty(x_Rd.shape, dtype=x_Rd.dtype)
    _run("mtlora_rms_norm_backward", 0, isa, first=grad_Rd, second=weight_d, third=x_Rd, inverse=inverse_R, out=out_Rd)
    return out_Rd


def swiglu(gate_Rd: torch.Tensor, up_Rd: torch.Tensor, isa: int = ISA) -> torch.Tensor:
    """silu(gate) * up."""
    out_Rd = torch.empty(gate_Rd.shape, dtype=gate_Rd.dtype)
    _run("mtlora_swiglu", 0, isa, first=gate_Rd, second=up_Rd, out=out_Rd)
    return out_Rd


def swiglu_backward(
    grad_Rd: torch.Tensor, gate_Rd: torch.Tensor, up_Rd: torch.Tensor, isa: int = ISA
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `swiglu`'s gate and up."""
    grad_gate_Rd, grad_up_Rd = (torch.empty(gate_Rd.shape, dtype=gate_Rd.dtype) for _ in range(2))
    _run(
        "mtlora_swiglu_backward",
        0,
        isa,
        first=grad_Rd,
        second=gate_Rd,
        third=up_Rd,
        out=grad_gate_Rd,
        also_out=grad_up_Rd,
    )
    return grad_gate_Rd, grad_up_Rd


def norm(x_Rd: torch.Tensor, weight_d: torch.Tensor, epsilon: float, isa: int = ISA) -> torch.Tensor:
    """`rms_norm` of a contiguous x for inference: does not return the inverse."""
    out_Rd = torch.empty_like(x_Rd)
    _library().mtlora_norm(
        x_Rd.data_ptr(), weight_d.data_ptr(), out_Rd.data_ptr(), *_rows(x_Rd), epsilon, *_how(x_Rd, isa)
    )  # fmt: skip
    return out_Rd


def add_rms_norm_(
    x_Rd: torch.Tensor, residual_Rd: torch.Tensor, weight_d: torch.Tensor, epsilon: float, isa: int = ISA
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite x with `rms_norm` of x + residual, and the residual with the sum; both contiguous. Returns both.

    Normalises the sum before rounding it to its dtype, as in vLLM (vllm/ir/ops/layernorm.py).
    """
    _library().mtlora_add_rms_norm(
        x_Rd.data_ptr(), residual_Rd.data_ptr(), weight_d.data_ptr(), *_rows(x_Rd), epsilon, *_how(x_Rd, isa)
    )
    return x_Rd, residual_Rd


def silu_and_mul(gate_up_RW: torch.Tensor, isa: int = ISA) -> torch.Tensor:
    """silu(gate) * up of a contiguous tensor with gate and up side by side, as vLLM stores them."""
    out_Rd = torch.empty((*gate_up_RW.shape[:-1], gate_up_RW.shape[-1] // 2), dtype=gate_up_RW.dtype)
    _library().mtlora_silu_and_mul(gate_up_RW.data_ptr(), out_Rd.data_ptr(), *_rows(out_Rd), *_how(gate_up_RW, isa))
    return out_Rd


def causal_softmax_(scores_MLL: torch.Tensor, scaling: float, isa: int = ISA) -> torch.Tensor:
    """Causal softmax(scaling * scores) over the last dimension, in place.

    scores: contiguous, queries by keys; keys after a query get zero. scaling: positive.
    """
    _run("mtlora_causal_softmax", scaling, isa, first=scores_MLL, out=scores_MLL)
    return scores_MLL


def mask_(logits_RV: torch.Tensor, bits_NU: np.ndarray[Any, np.dtype[np.int32]], rows: Sequence[int]) -> None:
    """Set row rows[i] of contiguous logits to -inf where a bit of row i of `bits_NU` is 0. Raises ValueError."""
    size, words = logits_RV.shape[1], bits_NU.shape[1]
    if len(rows) != len(bits_NU) or 32 * words < size or not all(0 <= row < len(logits_RV) for row in rows):
        raise ValueError(f"expected a mask of {size} bits a row, found {bits_NU.shape} words for rows {rows}")
    bits_NU = np.ascontiguousarray(bits_NU, dtype=np.int32)
    _library().mtlora_mask(
        logits_RV.data_ptr(), bits_NU.ctypes.data, (_LONG * len(rows))(*rows), len(rows), size, words,
        KERNEL_DTYPES.index(logits_RV.dtype),
    )  # fmt: skip


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    size = tensor.shape[-1]
    return tensor.numel() // size, size


def _how(tensor: torch.Tensor, isa: int) -> tuple[int, int, int]:
    return int(tensor.dtype is torch.bfloat16), torch.get_num_threads(), isa


def _run(function: str, number: float, isa: int, **tensors: torch.Tensor) -> None:
    given = {name: tensor.contiguous() for name, tensor in tensors.items()}
    first = given["first"]
    call = ElementwiseCall(
        rows=first.numel() // first.shape[-1], size=first.shape[-1], number=number,
        dtype=KERNEL_DTYPES.index(first.dtype), threads=torch.get_num_threads(), isa=isa,
        **{name: tensor.data_ptr() for name, tensor in given.items()},
    )  # fmt: skip
    getattr(_library(), function)(ctypes.byref(call))
