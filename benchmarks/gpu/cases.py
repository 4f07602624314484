"""Random batches over random adapters, with the oracle's output.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups, b rows of a bias table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import PackedBlock, pack_block
from mtlora.ops.plan import plan_step
from mtlora.ops.reference import routed_lora_reference
from mtlora.ops.table import AdapterRows, AdapterTable, Layout
from mtlora.ops.tuning import KernelConfig

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Shape:
    """r, N, G of an adapter, and how many rows of router biases it has."""

    r: int
    N: int
    G: int
    bias_rows: int = 0


@dataclass(frozen=True)
class Case:
    """A batch: `rows` and `bias_rows` for each token, an adapter (or None) for each row."""

    D: int
    shapes: tuple[Shape | None, ...]
    rows: tuple[int, ...]
    bias_rows: tuple[int, ...]
    seed: int = 0


class ReferenceAdapter(NamedTuple):
    """One adapter's weights for one block, as in a checkpoint.

    bias_bGN: the router biases of its tasks, or None.
    """

    lora_A_rD: torch.Tensor
    lora_B_NDr: torch.Tensor
    lora_route: torch.Tensor
    bias_bGN: torch.Tensor | None
    num_groups: int
    scaling: float


def routed_lora_batch_reference(
    x_TD: torch.Tensor,
    adapters: Sequence[ReferenceAdapter | None],
    rows: Sequence[int],
    bias_rows: Sequence[int],
) -> torch.Tensor:
    """The path's output [T, D] in float64 for a batch of many adapters.

    rows: index into `adapters` per token, -1 for none; an empty row (None) adds nothing.
    bias_rows: row of the adapter's bias table per token, -1 for none.
    """
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, (row, bias_row) in enumerate(zip(rows, bias_rows, strict=True)):
        adapter = adapters[row] if row >= 0 else None
        if adapter is None:
            continue
        A, B, R, table, num_groups, scaling = adapter
        bias_TGN = None if table is None or bias_row < 0 else table[bias_row : bias_row + 1]
        out_TD[t] = routed_lora_reference(x_TD[t : t + 1], A, B, R, bias_TGN, num_groups=num_groups, scaling=scaling)[0]
    return out_TD


def random_rows(shapes: Sequence[Shape | None], tokens: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A row of the table, or none, for each token, and a bias row of its adapter, or none."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, len(shapes), tokens)
    bias_rows = [(shapes[a].bias_rows if a >= 0 and shapes[a] else 0) for a in rows]
    return tuple(map(int, rows)), tuple(int(rng.integers(-1, n)) if n else -1 for n in bias_rows)


class Batch:
    """A case's tensors on a device, in a dtype, and the expected output."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str = "cpu",
        tile_size: int = 8,
        *,
        layout: Layout | None = None,
        config: KernelConfig | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        D, self.dtype, self.device = case.D, dtype, torch.device(device)
        adapters: list[ReferenceAdapter | None] = []
        self.blocks: list[PackedBlock | None] = []
        self.table = AdapterTable(1, len(case.shapes), hidden_size=D, dtype=dtype, device=self.device, config=config)
        for row, shape in enumerate(case.shapes):
            if shape is None:
                adapters.append(None)
                self.blocks.append(None)
                continue
            A, R = (randn(n, D).div(D**0.5).to(dtype) for n in (shape.r, shape.G * shape.N))
            B = randn(shape.N, D, shape.r).div(shape.r**0.5).to(dtype)
            bias = randn(shape.bias_rows, shape.G, shape.N) if shape.bias_rows else None
            # A power of two, so that scaled experts round as experts do.
            adapters.append(ReferenceAdapter(A, B, R, bias, shape.G, 2.0))
            block = pack_block(A, B, R, num_groups=shape.G, scaling=2.0, dtype=dtype, bias_bGN=bias).to(self.device)
            self.blocks.append(block)
            self.table.place(row, AdapterRows([block], layout=layout))
        x_TD, y_TD = randn(len(case.rows), D).to(dtype), randn(len(case.rows), D).to(dtype)
        delta_TD = routed_lora_batch_reference(x_TD, adapters, case.rows, case.bias_rows)
        self.expected_TD = y_TD.double() + delta_TD
        self.untouched_T = torch.tensor([s < 0 or case.shapes[s] is None for s in case.rows])
        self.x_TD, self.y_TD = x_TD.to(self.device), y_TD.to(self.device)
        self.before_TD = y_TD.clone()
        rows, bias_rows = np.array(case.rows, dtype=int), np.array(case.bias_rows, dtype=int)
        self.plan = plan_step(rows, bias_rows, num_rows=len(case.shapes), tile_size=tile_size)

    @property
    def mix(self) -> Mix:
        """The arguments of the CPU backend."""
        return Mix.of(self.y_TD, self.x_TD, self.table, 0, self.plan)

    def check(self) -> None:
        """y equals the oracle's output, and tokens without an adapter keep their bits."""
        found_TD = self.y_TD.cpu()
        assert torch.equal(found_TD[self.untouched_T], self.before_TD[self.untouched_T])
        error = (found_TD.double() - self.expected_TD).norm() / self.expected_TD.norm()
        assert error < TOLERANCE[self.dtype], f"relative error {error:.2e}"


_LOOK = (Shape(4, 3, 2), None, Shape(16, 8, 4, 5), Shape(5, 1, 1))


def mixed(tokens: int, D: int, shapes: tuple[Shape | None, ...] = _LOOK) -> Case:
    """A batch of random rows."""
    return Case(D, shapes, *random_rows(shapes, tokens, seed=0))


SHAPE_CLASSES = {
    "one-token": Case(48, (Shape(4, 3, 2),), (0,), (-1,)),
    "many-tokens-of-one": Case(32, (Shape(4, 2, 2, 2),), (0,) * 512, (1, -1, 0, 1) * 128),
    "many-tokens-of-many": mixed(96, 64),
    "no-adapter-at-all": Case(32, (None, None), (-1, 0, 1, -1), (-1,) * 4),
    "rank-64": mixed(9, 64, (Shape(64, 2, 2), Shape(4, 2, 1))),
    "experts-1-and-32": mixed(9, 64, (Shape(4, 1, 1), Shape(4, 32, 2, 3))),
    "groups-1-and-32": mixed(9, 64, (Shape(4, 2, 1), Shape(4, 2, 32, 2))),
    "ragged-sizes": mixed(17, 90, (Shape(7, 3, 3, 2), Shape(5, 5, 5), Shape(3, 2, 2))),
}
