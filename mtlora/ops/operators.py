"""The registered operator of serving, `mtlora::add_mixed_paths_`: y += path(x) for a step's whole mix of adapters.

y, x, rows, tokens, bias_rows, tiles: a `Mix`; limits: the table's `TableLimits`; tile_size: the plan's. Its allocations
do not depend on the tensors' values, and on a GPU it never waits: only the device reads values, so graphs can capture
it.

The operator checks what it can without reading a GPU's memory, before any kernel runs. `AdapterRows` checks weights
when they are packed, and `plan_step` checks rows when it plans the step.
"""

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from mtlora.ops import cpu, cpu_kernel, tuning
from mtlora.ops.mix import Mix
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import AdapterTable, TableLimits

# Adds to y [T, D], in place, the path of x [T, D] in a block, by its number.
AddPath = Callable[[torch.Tensor, torch.Tensor, int], None]

# Kept for the life of the process: the operator goes with its library.
_LIBRARY = torch.library.Library("mtlora", "FRAGMENT")
_LIBRARY.define(
    "add_mixed_paths_(Tensor(a!) y, Tensor x, Tensor rows, Tensor tokens, Tensor bias_rows, Tensor tiles, "
    "int[] limits, int tile_size) -> ()"
)


def tile_size(device: torch.device, num_tokens: int) -> int:
    """Tokens of a tile that suit a device and a step of `num_tokens`."""
    return cpu_kernel.TILE_SIZE if device.type == "cpu" else tuning.tile_size(num_tokens)


def add_mixed_paths_(y_TD: torch.Tensor, x_TD: torch.Tensor, table: AdapterTable, block: int, plan: StepPlan) -> None:
    """Add to `y_TD`, in place, the path of block number `block` for every token of the plan.

    Raises ValueError as the operator does, and for tensors of another dtype, device or hidden size than the table's.
    """
    if (x_TD.dtype, x_TD.device, x_TD.shape[-1]) != table.kind:
        found = (x_TD.dtype, x_TD.device, x_TD.shape[-1])
        raise ValueError(f"x is of {found}, the table's adapters of {table.kind} (dtype, device, hidden size)")
    mix = Mix.of(y_TD, x_TD, table, block, plan)
    torch.ops.mtlora.add_mixed_paths_(*mix, list(astuple(table.limits)), plan.tile_size)


def bind(table: AdapterTable, plan: StepPlan) -> AddPath:
    """`add_mixed_paths_` for one step, as `run(y_TD, x_TD, block)` with the least cost per call."""
    run = cpu.bind(table, plan) if table.rows_LAF.device.type == "cpu" else None
    return run or (lambda y_TD, x_TD, block: add_mixed_paths_(y_TD, x_TD, table, block, plan))


def _checked(tensors: list[torch.Tensor]) -> Mix:
    mix = Mix(*tensors)
    mix.check()
    return mix


def _on_cpu(*arguments: Any) -> None:
    *tensors, _limits, _tile_size = arguments
    cpu.add_mixed_paths_(_checked(tensors))


def _on_cuda(*arguments: Any) -> None:
    # Imported here: CPU installations have no Triton.
    from mtlora.ops import triton_gpu

    *tensors, limits, tile_size = arguments
    triton_gpu.add_mixed_paths_(_checked(tensors), TableLimits(*limits), tile_size)


def _fake(*arguments: Any) -> None:
    *tensors, _limits, _tile_size = arguments
    _checked(tensors)


_LIBRARY.impl("add_mixed_paths_", _on_cpu, "CPU")
_LIBRARY.impl("add_mixed_paths_", _on_cuda, "CUDA")
torch.library.register_fake("mtlora::add_mixed_paths_", _fake, lib=_LIBRARY)
