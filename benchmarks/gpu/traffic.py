"""Bytes that the kernels move, counted by running them in Triton's interpreter and noting every address.

An access moves whole sectors of 32 bytes, as a card does. Addresses of one access that share a sector count once; a
later access counts again, because it asks the L2 cache again.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SECTOR = 32


@dataclass
class Traffic:
    """Sectors by the name of the tensor that holds them; "elsewhere" for addresses outside the named tensors.

    loaded, stored: moved by all accesses. touched: distinct ones, which is what memory itself must deliver.
    programs: those that loaded some, by tensor.
    """

    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    touched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    programs: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))

    def loaded_bytes(self, name: str) -> int:
        """Bytes of `name` that all accesses loaded."""
        return SECTOR * self.loaded[name]

    def touched_bytes(self, name: str) -> int:
        """Bytes of `name` that were accessed at all."""
        return SECTOR * len(self.touched[name])


@contextmanager
def recorded(tensors: Mapping[str, list[torch.Tensor]]) -> Iterator[Traffic]:
    """Record what launches in this context move. Several tensors may share a name."""
    from triton.runtime import interpreter

    traffic = Traffic()
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes(), name)
        for name, some in tensors.items()
        for tensor in some
    )
    starts = [start for start, _, _ in spans]
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

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

    builder.create_masked_load, builder.create_masked_store = noting_load, noting_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
