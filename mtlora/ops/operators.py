"""The registered operator of serving, `mtlora::add_routed_lora_`: y += path(x) for a step's whole mix of adapters.

y, x: [T, D], of the adapters' dtype; rows: a block's part of a `SlotTable`; tokens, bias_rows, tiles: a `StepPlan`;
limits: the table's `Limits`; tile_size: the plan's. It allocates nothing that depends on the tensors' values, and on a
GPU it waits for nothing: values are read on the device alone, so that graphs can capture it.

What can be told without reading a GPU's memory is checked before any kernel runs; that weights are sound was checked
where the table was filled, that slots are in range where the plan was made.
"""

from collections.abc import Callable
from dataclasses import astuple

import torch

from mtlora.ops import cpu, cpu_kernel, tuning
from mtlora.ops.checks import check
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import Limits, SlotTable

# Adds to y [T, D], in place, the path of x [T, D] in a block, by its number.
AddPath = Callable[[torch.Tensor, torch.Tensor, int], None]

# Lives as long as the process: the operator goes with its library.
_LIBRARY = torch.library.Library("mtlora", "FRAGMENT")
_LIBRARY.define(
    "add_routed_lora_(Tensor(a!) y, Tensor x, Tensor rows, Tensor tokens, Tensor bias_rows, Tensor tiles, "
    "int[] limits, int tile_size) -> ()"
)


def tile_size(device: torch.device, num_tokens: int) -> int:
    """Tokens of a tile that suit a device and a step of so many tokens."""
    return cpu_kernel.TILE_SIZE if device.type == "cpu" else tuning.tile_size(num_tokens)


def add_routed_lora_(y_TD: torch.Tensor, x_TD: torch.Tensor, table: SlotTable, block: int, plan: StepPlan) -> None:
    """Add to `y_TD`, in place, the path of block number `block` for every token of the plan.

    Raises ValueError as the operator does, and for tensors of another dtype, device or hidden size than the table's.
    """
    if (x_TD.dtype, x_TD.device, x_TD.shape[-1]) != table.kind:
        found = (x_TD.dtype, x_TD.device, x_TD.shape[-1])
        raise ValueError(f"x is of {found}, the table's adapters of {table.kind} (dtype, device, hidden size)")
    limits = list(astuple(table.limits))
    torch.ops.mtlora.add_routed_lora_(
        y_TD, x_TD, table.rows_LAF[block], plan.tokens_T, plan.bias_rows_T, plan.tiles_M3, limits, plan.tile_size
    )


def bind(table: SlotTable, plan: StepPlan) -> AddPath:
    """`add_routed_lora_` for one step: `run(y_TD, x_TD, block)` at the least cost a call."""
    run = cpu.bind(table, plan) if table.rows_LAF.device.type == "cpu" else None
    return run or (lambda y_TD, x_TD, block: add_routed_lora_(y_TD, x_TD, table, block, plan))


def _on_cpu(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    bias_rows: torch.Tensor,
    tiles: torch.Tensor,
    limits: list[int],
    tile_size: int,
) -> None:
    check(y, x, rows, tokens, bias_rows, tiles)
    cpu.add_routed_lora_(y, x, rows, tokens, bias_rows, tiles)


def _on_cuda(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    bias_rows: torch.Tensor,
    tiles: torch.Tensor,
    limits: list[int],
    tile_size: int,
) -> None:
    # Imported here: CPU installations have no Triton.
    from mtlora.ops import triton_gpu

    check(y, x, rows, tokens, bias_rows, tiles)
    triton_gpu.add_routed_lora_(y, x, rows, tokens, bias_rows, tiles, Limits(*limits), tile_size)


def _fake(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    bias_rows: torch.Tensor,
    tiles: torch.Tensor,
    limits: list[int],
    tile_size: int,
) -> None:
    check(y, x, rows, tokens, bias_rows, tiles)


_LIBRARY.impl("add_routed_lora_", _on_cpu, "CPU")
_LIBRARY.impl("add_routed_lora_", _on_cuda, "CUDA")
torch.library.register_fake("mtlora::add_routed_lora_", _fake, lib=_LIBRARY)
