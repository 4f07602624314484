"""The adapter of each row of the running batch: computed once a step, read by every block.

Shape suffixes: T tokens of the step, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set

import numpy as np
import torch

from mtlora.ops.cpu import AddPath, bind
from mtlora.ops.cpu_kernel import TILE_SIZE
from mtlora.ops.plan import plan_step
from mtlora.ops.table import AdapterRows, AdapterTable
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.sampling import RoutingSampler


class StepMapping(ABC):
    """The adapters in the rows of a table, and the step's tokens by row.

    Rows without an adapter, padding among them, are in no tile. There is one object a model; compiled and captured
    graphs hold the object, and its content changes between steps.

    scratch: what `begin` writes and `finish_` reads. begins: whether `begin` does anything.
    """

    begins: bool
    scratch: torch.Tensor

    def __init__(self, table: AdapterTable, sampler: RoutingSampler | None = None) -> None:
        self._table = table
        self.sampler = sampler
        # Least recently used first.
        self._row_of: dict[AdapterRows, int] = {}
        self._free = list(range(table.num_rows))
        self.clear()

    def clear(self) -> None:
        """No token has an adapter."""
        nobody: dict[int, Slot] = {}
        self.set(np.empty(0, dtype=np.int64), nobody.__getitem__)

    def set(self, slot_ids_T: np.ndarray, slot: Callable[[int], Slot]) -> None:
        """Take the slot id of every token, int64 [T], 0 or less for none; `slot` gives the slot of an id.

        One adapter's slots share a row of the table, and it stays there until another needs the row. Raises IndexError
        for more adapters than the table has rows.
        """
        # Work on runs of equal slots: a sequence's tokens are neighbours, so runs are fewer than tokens.
        starts = np.flatnonzero(np.diff(slot_ids_T, prepend=slot_ids_T[:1] - 1))
        lengths = np.diff(starts, append=len(slot_ids_T))
        ids = slot_ids_T[starts].tolist()
        held = {slot_id: slot(slot_id) for slot_id in set(ids) if slot_id > 0}
        adapters = {s.adapter.rows: s for s in held.values() if s.adapter is not None}
        self._place(adapters.keys())
        row_of = {i: self._row_of[s.adapter.rows] for i, s in held.items() if s.adapter is not None}
        bias_row_of = {i: held[i].bias_row for i in row_of}
        row_T = np.repeat(np.array([row_of.get(i, -1) for i in ids], dtype=np.int64), lengths)
        bias_row_T = np.repeat(np.array([bias_row_of.get(i, -1) for i in ids], dtype=np.int64), lengths)
        self._take(row_T, bias_row_T, {self._row_of[rows]: s for rows, s in adapters.items()}, any_slot=bool(held))

    @abstractmethod
    def _take(self, row_T: np.ndarray, bias_row_T: np.ndarray, slots: dict[int, Slot], *, any_slot: bool) -> None:
        """Plan a step.

        slots: one for each row that has tokens. any_slot: whether tokens name slots, dummy ones too.
        """

    @abstractmethod
    def begin(self, x_TD: torch.Tensor, block: int, *, beside: bool) -> None:
        """Compute what of the path needs no y. beside: whether it may run at the same time as the block itself."""

    @abstractmethod
    def finish_(self, y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        """Add to `y_TD`, in place, the path of block number `block` for every row that has an adapter."""

    def next_step(self) -> bool:
        """Call it once a step, before its `set`; whether `set` must be called although no token's slot has changed."""
        return False

    def release(self, rows: AdapterRows) -> None:
        """Empty an adapter's row, before its weights are freed."""
        if (row := self._row_of.pop(rows, None)) is not None:
            self._table.place(row, None)
            self._free.append(row)

    def _place(self, wanted: Set[AdapterRows]) -> None:
        """Put the step's adapters in the table; those that are there keep their rows."""
        if len(wanted) > self._table.num_rows:
            raise IndexError(f"{len(wanted)} adapters in a step, the table has {self._table.num_rows} rows")
        for rows in wanted & self._row_of.keys():
            self._row_of[rows] = self._row_of.pop(rows)
        for rows in wanted - self._row_of.keys():
            if not self._free:
                self.release(next(iter(self._row_of)))
            row = self._free.pop()
            self._table.place(row, rows)
            self._row_of[rows] = row


class CpuStep(StepMapping):
    """A step on a CPU; `finish_` does all of the work."""

    begins = False

    def __init__(self, table: AdapterTable, sampler: RoutingSampler | None = None) -> None:
        self.scratch = torch.empty(0)
        super().__init__(table, sampler)

    def _take(self, row_T: np.ndarray, bias_row_T: np.ndarray, slots: dict[int, Slot], *, any_slot: bool) -> None:
        self._num_tokens = len(row_T)
        self._slots = slots
        held = [slot.adapter.rows for slot in slots.values() if slot.adapter is not None]
        self._blocks: frozenset[int] = frozenset().union(*(rows.active for rows in held))
        if slots:
            plan = self._plan = plan_step(row_T, bias_row_T, num_rows=self._table.num_rows, tile_size=TILE_SIZE)
            self._add_path_: AddPath = bind(self._table, plan)

    def begin(self, x_TD: torch.Tensor, block: int, *, beside: bool) -> None:
        """Does nothing."""

    def finish_(self, y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        """Add to `y_TD`, in place, the path of block number `block` for every row that has an adapter."""
        if self._num_tokens > len(x_TD):
            raise RuntimeError(f"block {block}: {len(x_TD)} rows in a step of {self._num_tokens} tokens")
        if block in self._blocks:
            self._add_path_(y_TD, x_TD, block)
            if self.sampler and self.sampler.due(block):
                self.sampler.observe(x_TD, self._table, block, self._plan, self._slots)
