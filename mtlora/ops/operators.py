"""The registered operator of serving on CPUs, `mtlora::add_mixed_paths_`: y += path(x) for a step's whole mix of adapters.

y, x, rows, tokens, bias_rows, tiles: a `Mix`, on a CPU; a GPU's launches take the same from buffers of fixed address
(`triton_gpu.Path`). The operator checks its tensors before any kernel runs. `AdapterRows` checks weights when they are
packed, and `plan_step` checks rows when it plans the step.
"""

from collections.abc import Callable

import torch

from mtlora.ops import cpu
from mtlora.ops.mix import Mix
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import AdapterTable

# Adds to y [T, D], in place, the path of x [T, D] in a block, by its number.
AddPath = Callable[[torch.Tensor, torch.Tensor, int], None]

# Kept for the life of the process: the operator goes with its library.
_LIBRARY = torch.library.Library("mtlora", "FRAGMENT")
_LIBRARY.define(
    "add_mixed_paths_(Tensor(a!) y, Tensor x, Tensor rows, Tensor tokens, Tensor bias_rows, Tensor tiles) -> ()"
)


def add_mixed_paths_(y_TD: torch.Tensor, x_TD: torch.Tensor, table: AdapterTable, block: int, plan: StepPlan) -> None:
    """Add to `y_TD`, in place, the path of block number `block` for every token of the plan.

    Raises ValueError as the operator does, and for tensors of another dtype, device or hidden size than the table's.
    """
    if (x_TD.dtype, x_TD.device, x_TD.shape[-1]) != table.kind:
        found = (x_TD.dtype, x_TD.device, x_TD.shape[-1])
        raise ValueError(f"x is of {found}, the table's adapters of {table.kind} (dtype, device, hidden size)")
    torch.ops.mtlora.add_mixed_paths_(*Mix.of(y_TD, x_TD, table, block, plan))


def bind(table: AdapterTable, plan: StepPlan) -> AddPath:
    """`add_mixed_paths_` for one step, as `run(y_TD, x_TD, block)` with the least cost per call."""
    return cpu.bind(table, plan) or (lambda y_TD, x_TD, block: add_mixed_paths_(y_TD, x_TD, table, block, plan))


def _on_cpu(*tensors: torch.Tensor) -> None:
    mix = Mix(*tensors)
    mix.check()
    cpu.add_mixed_paths_(mix)


def _fake(*tensors: torch.Tensor) -> None:
    Mix(*tensors).check()


_LIBRARY.impl("add_mixed_paths_", _on_cpu, "CPU")
torch.library.register_fake("mtlora::add_mixed_paths_", _fake, lib=_LIBRARY)
