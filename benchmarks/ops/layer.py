"""Variants of a layer of the routed path: in serving and in training, the operator beside plain torch.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from mtlora.ops import cpu, cpu_kernel
from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import pack_block
from mtlora.ops.plan import plan_step
from mtlora.ops.table import AdapterRows, AdapterTable
from mtlora.ops.training import path_with_gradients

# The default backbone and its adapters.
LAYERS, D, R, N, G = 30, 576, 16, 8, 4

Variant = Callable[[], None]


class TrainingSizes(NamedTuple):
    """One layer's sizes in training."""

    T: int
    D: int
    r: int
    N: int
    G: int


TRAINING = TrainingSizes(T=1024, D=576, r=16, N=16, G=2)


def serving_variants(tokens: int, adapters: int, layers: int) -> dict[str, Variant]:
    """The operator, and torch ops one adapter after another, over `layers` layers, each with its own weights."""
    dtype, device = torch.bfloat16, torch.device("cpu")
    table = AdapterTable(layers, adapters, hidden_size=D, dtype=dtype, device=device)
    for row in range(adapters):
        blocks = [
            pack_block(
                torch.randn(R, D) / D**0.5, torch.randn(N, D, R) / 100, torch.randn(G * N, D) / D**0.5,
                num_groups=G, scaling=2.0, dtype=dtype, bias_bGN=torch.randn(1, G, N),
            )
            for _ in range(layers)
        ]  # fmt: skip
        table.place(row, AdapterRows(blocks))
    row_T = np.arange(tokens) % adapters
    plan = plan_step(row_T, np.zeros_like(row_T), num_rows=adapters, tile_size=cpu_kernel.TILE_SIZE)
    x_TD, y_TD = torch.randn(tokens, D).to(dtype), torch.zeros(tokens, D, dtype=dtype)

    def operator() -> None:
        add_path_ = cpu.bind(table, plan)
        for layer in range(layers):
            add_path_(y_TD, x_TD, layer)

    def torch_ops() -> None:
        for layer in range(layers):
            cpu.in_torch_ops(Mix.of(y_TD, x_TD, table, layer, plan))

    return {"operator": operator, "torch ops, one adapter after another": torch_ops}


def expert_loop(
    x_TD: torch.Tensor, A: torch.Tensor, B_NDr: torch.Tensor, route: torch.Tensor, num_groups: int, scaling: float
) -> torch.Tensor:
    """The path as the paper's authors write it: a product and a weighted sum for each expert, N tensors [T, D]."""
    T, num_experts = len(x_TD), len(B_NDr)
    h_Tr = x_TD @ A.t()
    weights_TGN = torch.softmax((x_TD @ route.t()).view(T, num_groups, num_experts), dim=-1)
    out = torch.zeros_like(x_TD).view(T, num_groups, -1)
    for i in range(num_experts):
        out = out + weights_TGN[:, :, i, None] * (h_Tr @ B_NDr[i].t()).view(T, num_groups, -1)
    return out.view(T, -1) * scaling


def training_variants(sizes: TrainingSizes = TRAINING, device: str = "cpu") -> dict[str, Variant]:
    """Forward and backward of one layer, in float32."""
    T, D, r, N, G = sizes
    x_TD = torch.randn(T, D, device=device, requires_grad=True)
    shapes = ((r, D), (N, D, r), (G * N, D))
    A, B_NDr, route = (torch.randn(*shape, device=device).div_(10).requires_grad_() for shape in shapes)
    inputs = [x_TD, A, B_NDr, route]
    grad_TD = torch.randn(T, D, device=device)

    def ours() -> None:
        out, _ = path_with_gradients(x_TD, A, B_NDr, route, None, num_groups=G, scaling=2.0)
        torch.autograd.grad(out, inputs, grad_TD)

    def loop() -> None:
        torch.autograd.grad(expert_loop(x_TD, A, B_NDr, route, G, 2.0), inputs, grad_TD)

    return {"operator": ours, "loop over experts": loop}


def peak_bytes(run: Variant) -> int:
    """Peak bytes of the tensors that `run` allocates."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
