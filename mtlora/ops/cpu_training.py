"""The compiled kernel of training on a CPU, `csrc/training.cpp`: one adapter's path and its gradients, in float32.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch

from mtlora.ops.cpu_kernel import ISA, KERNEL_DTYPES, kernel_part

# Version of `TrainingCall`, `mtlora_training_layout` in the kernel's source.
LAYOUT = 1

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
# Tensors in the order of `TrainingCall` in the kernel's source, which describes each.
_TENSORS = (
    "x", "dropped", "lora_A", "lora_B", "route", "bias", "weights", "h", "delta", "grad_delta", "grad_weights",
    "grad_x", "grad_dropped", "grad_A", "grad_B", "grad_route", "grad_logits",
)  # fmt: skip

# Gradients of x, dropped, A, B, R and the logits.
Gradients = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # fmt: skip


class PathInputs(NamedTuple):
    """The inputs of one adapter's path; lora_route is [G*N, D], dropped_TD is x after dropout, None without dropout."""

    x_TD: torch.Tensor
    dropped_TD: torch.Tensor | None
    lora_A_rD: torch.Tensor
    lora_B_NDr: torch.Tensor
    lora_route: torch.Tensor
    bias_TGN: torch.Tensor | None
    num_groups: int
    scaling: float


class Saved(NamedTuple):
    """Tensors saved for the backward pass: the first five inputs, the routing weights, h = A x."""

    x_TD: torch.Tensor
    dropped_TD: torch.Tensor | None
    lora_A_rD: torch.Tensor
    lora_B_NDr: torch.Tensor
    lora_route: torch.Tensor
    weights_TGN: torch.Tensor
    h_Tr: torch.Tensor


class TrainingCall(ctypes.Structure):
    """One call's sizes and tensors."""

    _fields_ = (
        ("tokens", _LONG),
        ("hidden", _LONG),
        ("rank", _LONG),
        ("experts", _LONG),
        ("groups", _LONG),
        ("scaling", _FLOAT),
        ("dtype", _INT),
        ("threads", _INT),
        ("isa", _INT),
        *((name, _ADDRESS) for name in _TENSORS),
    )


@cache
def _library() -> ctypes.CDLL | None:
    return kernel_part("training", LAYOUT)


def runs(x_TD: torch.Tensor, lora_A_rD: torch.Tensor) -> bool:
    """Whether the kernel supports an input and parameters of these dtypes on this machine."""
    return (
        x_TD.device.type == "cpu"
        and x_TD.dtype in KERNEL_DTYPES
        and lora_A_rD.dtype == torch.float32
        and len(x_TD) > 0
        and _library() is not None
    )


def forward(inputs: PathInputs, isa: int = ISA) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(delta [T, D] in x's dtype, routing weights [T, G, N] and h = A x [T, r] in float32)."""
    x_TD, dropped_TD, lora_A_rD, lora_B_NDr, lora_route, bias_TGN, num_groups, scaling = inputs
    (T, D), (N, _, r) = x_TD.shape, lora_B_NDr.shape
    delta_TD = torch.empty(T, D, dtype=x_TD.dtype)
    weights_TGN, h_Tr = torch.empty(T, num_groups, N), torch.empty(T, r)
    _run(
        "mtlora_training_forward", x_TD, scaling, isa,
        dropped=dropped_TD, lora_A=lora_A_rD, lora_B=lora_B_NDr, route=lora_route,
        bias=None if bias_TGN is None else bias_TGN.float(), weights=weights_TGN, h=h_Tr, delta=delta_TD,
    )  # fmt: skip
    return delta_TD, weights_TGN, h_Tr


def backward(
    grad_delta_TD: torch.Tensor,
    grad_weights_TGN: torch.Tensor | None,
    saved: Saved,
    scaling: float,
    *,
    needs_x: bool,
    needs_dropped: bool,
    isa: int = ISA,
) -> Gradients:
    """Gradients of x, dropped, A, B, R and the logits [T, G, N]; those of x and dropped only if needed."""
    x_TD, dropped_TD, lora_A_rD, lora_B_NDr, lora_route, weights_TGN, h_Tr = saved
    grad_x_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype) if needs_x else None
    grad_dropped_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype) if needs_dropped else None
    grad_A, grad_B, grad_route = (torch.empty(t.shape) for t in (lora_A_rD, lora_B_NDr, lora_route))
    grad_logits_TGN = torch.empty(weights_TGN.shape)
    _run(
        "mtlora_training_backward", x_TD, scaling, isa,
        dropped=dropped_TD, lora_A=lora_A_rD, lora_B=lora_B_NDr, route=lora_route, weights=weights_TGN, h=h_Tr,
        grad_delta=grad_delta_TD.to(x_TD.dtype), grad_weights=grad_weights_TGN, grad_x=grad_x_TD,
        grad_dropped=grad_dropped_TD, grad_A=grad_A, grad_B=grad_B, grad_route=grad_route, grad_logits=grad_logits_TGN,
    )  # fmt: skip
    return grad_x_TD, grad_dropped_TD, grad_A, grad_B, grad_route, grad_logits_TGN


def _run(function: str, x_TD: torch.Tensor, scaling: float, isa: int, **tensors: torch.Tensor | None) -> None:
    given = {name: tensor.contiguous() for name, tensor in {"x": x_TD, **tensors}.items() if tensor is not None}
    lora_B, weights = given["lora_B"], given["weights"]
    call = TrainingCall(
        tokens=len(x_TD), hidden=x_TD.shape[1], rank=lora_B.shape[2], experts=len(lora_B), groups=weights.shape[1],
        scaling=scaling, dtype=KERNEL_DTYPES.index(x_TD.dtype), threads=torch.get_num_threads(), isa=isa,
        **{name: tensor.data_ptr() for name, tensor in given.items()},
    )  # fmt: skip
    library = _library()
    assert library is not None
    if getattr(library, function)(ctypes.byref(call)):
        raise MemoryError(f"{function}: no memory for a call of {call.tokens} tokens")
