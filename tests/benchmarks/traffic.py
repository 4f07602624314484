"""Bytes that the kernels move, counted by running them in Triton's interpreter and noting every address.

An access moves whole sectors of 32 bytes, as a card does. Addresses of one access that share a sector count once; a
later access counts again, because it asks the L2 cache again.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.adapters import Adapters
from mtlora.ops.table import Field
from mtlora.ops.tuning import padded

SECTOR = 32


@dataclass
class Traffic:
    """Sectors by the name of the tensor that holds them; "elsewhere" for addresses outside the named tensors.

    loaded, stored: moved by all accesses. touched: distinct ones, which is what memory itself must deliver.
    programs: those that accessed some, by tensor. products: of tiles, by program.
    """

    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    touched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    programs: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))
    products: dict[tuple[int, ...], int] = field(default_factory=lambda: defaultdict(int))

    def loaded_bytes(self, name: str) -> int:
        """Bytes of `name` that all accesses loaded."""
        return SECTOR * self.loaded[name]

    def touched_bytes(self, name: str) -> int:
        """Bytes of `name` that were accessed at all."""
        return SECTOR * len(self.touched[name])


@contextmanager
def recorded(spans_of: Mapping[str, Iterable[tuple[int, int]]]) -> Iterator[Traffic]:
    """Record what launches in this context move. spans_of: (address, bytes) of the memory under each name."""
    from triton.runtime import interpreter

    traffic = Traffic()
    spans = sorted((start, start + size, name) for name, some in spans_of.items() for start, size in some)
    starts = [start for start, _, _ in spans]
    builder = interpreter.InterpreterBuilder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def note(self: Any, addresses: np.ndarray, mask: np.ndarray, counts: dict[str, int]) -> None:
        sectors = np.unique(np.broadcast_to(addresses, mask.shape)[mask.astype(bool)] // SECTOR)
        if not sectors.size:
            return
        # One access reads one tensor.
        first = int(sectors[0]) * SECTOR + SECTOR - 1
        at = bisect.bisect_right(starts, first) - 1
        name = spans[at][2] if at >= 0 and int(sectors[0]) * SECTOR < spans[at][1] else "elsewhere"
        counts[name] += len(sectors)
        traffic.touched[name].update(sectors.tolist())
        traffic.programs[name].add(tuple(self.grid_idx))

    def noting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        note(self, ptrs.data, mask.data, traffic.loaded)
        return load(self, ptrs, mask, *rest)

    def noting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(self, ptrs.data, mask.data, traffic.stored)
        return store(self, ptrs, value, mask, *rest)

    def noting_dot(self: Any, a: Any, *rest: Any) -> Any:
        traffic.products[tuple(self.grid_idx)] += 1
        return dot(self, a, *rest)

    builder.create_masked_load, builder.create_masked_store, builder.create_dot = noting_load, noting_store, noting_dot
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_dot = load, store, dot


def of_a_block(adapters: Adapters, tokens: int) -> tuple[Traffic, Traffic]:
    """(shrink, expand): what the launches of block 0 move in the planned step of `tokens`, in the interpreter."""
    config, buffers = adapters.config, adapters.buffers
    D, (r, N, G) = config.hidden_size, (adapters.shape.rank, adapters.shape.experts, adapters.shape.groups)
    x_TD = torch.ones(tokens, D, dtype=config.dtype)
    y_TD = torch.ones_like(x_TD)
    rows = [adapters.table.held(row).rows_LF[0] for row in adapters.blocks]  # type: ignore[union-attr]
    shrink, expand = D * padded(r + G * N) * x_TD.itemsize, G * N * r * padded(D // G) * x_TD.itemsize
    weights = ((Field.SHRINK, shrink), (Field.EXPAND, expand))
    spans = {
        "weights": [(int(row[at]), size) for row in rows for at, size in weights],
        **{
            name: [(tensor.data_ptr(), tensor.untyped_storage().nbytes())]
            for name, tensor in (
                ("x", x_TD), ("y", y_TD), ("scratch", buffers.scratch_QC), ("plan", buffers.plan_W),
                ("table", buffers.rows_ALF),
            )
        },
    }  # fmt: skip
    with recorded(spans) as of_shrink:
        adapters.path.begin(x_TD, 0)
    with recorded(spans) as of_expand:
        adapters.path.finish_(y_TD, 0)
    return of_shrink, of_expand
