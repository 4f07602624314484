"""The compiled operations of a backbone on a CPU, `csrc/elementwise.cpp`: one pass over memory each.

Tensors are float32 or bfloat16, all of a call alike; everything is computed in float32.
"""

import ctypes
from functools import cache
from typing import Any

import torch

from mtlora.ops.cpu_kernel import KERNEL_DTYPES, kernel_part

# Version of `ElementwiseCall`, `mtlora_elementwise_layout` in the kernel's source.
LAYOUT = 2

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class ElementwiseCall(ctypes.Structure):
    """One call's sizes and tensors; `ElementwiseCall` in the kernel's source."""

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
    return library


def runs(*tensors: torch.Tensor) -> bool:
    """Whether these may be given to the operations, on this machine."""
    dtype = tensors[0].dtype
    alike = all(tensor.dtype is dtype and tensor.is_cpu for tensor in tensors)
    return alike and dtype in KERNEL_DTYPES and _library() is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, isa: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """weight * x / sqrt(mean x^2 + epsilon) over the last dimension, and 1 / sqrt(...) [rows] in float32 for later."""
    out = torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32)
    _run("mtlora_rms_norm", epsilon, isa, first=x, second=weight, inverse=inverse, out=out)
    return out, inverse


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, isa: int = 0
) -> torch.Tensor:
    """The gradient of `rms_norm`'s x."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _run("mtlora_rms_norm_backward", 0, isa, first=grad, second=weight, third=x, inverse=inverse, out=out)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor, isa: int = 0) -> torch.Tensor:
    """silu(gate) * up."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _run("mtlora_swiglu", 0, isa, first=gate, second=up, out=out)
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, isa: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `swiglu`'s gate and up."""
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    _run("mtlora_swiglu_backward", 0, isa, first=grad, second=gate, third=up, out=grad_gate, also_out=grad_up)
    return grad_gate, grad_up


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, isa: int = 0) -> torch.Tensor:
    """`rms_norm` of a contiguous x [..., d], with nothing for a backward pass."""
    out = torch.empty_like(x)
    _library().mtlora_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), *_rows(x), epsilon, *_how(x, isa)
    )  # fmt: skip
    return out


def add_rms_norm_(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, isa: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + residual in x's place and the sum in the residual's; both contiguous [..., d]. Returns both.

    What is normalised is the sum before it is rounded to its dtype, as in vLLM (vllm/ir/ops/layernorm.py).
    """
    _library().mtlora_add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), *_rows(x), epsilon, *_how(x, isa)
    )
    return x, residual


def silu_and_mul(x: torch.Tensor, isa: int = 0) -> torch.Tensor:
    """silu(gate) * up [..., d] of a contiguous x [..., 2d] that holds gate and up side by side, as serving has them."""
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
    _library().mtlora_silu_and_mul(x.data_ptr(), out.data_ptr(), *_rows(out), *_how(x, isa))
    return out


def causal_softmax_(scores: torch.Tensor, scaling: float, isa: int = 0) -> torch.Tensor:
    """softmax(scaling * scores) over the last dimension's keys up to each query's own position, in place.

    scores: contiguous [..., L, L], queries by keys; keys beyond a query get zero. scaling: positive.
    """
    _run("mtlora_causal_softmax", scaling, isa, first=scores, out=scores)
    return scores


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
