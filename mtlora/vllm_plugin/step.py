"""The adapter of each row of the running batch: computed once a step, read by every block.

Shape suffixes: T tokens of the step.
"""

from collections.abc import Callable, Set

import numpy as np
import torch

from mtlora.ops.operators import AddPath, bind, tile_size
from mtlora.ops.plan import StepPlan, plan_step
from mtlora.ops.table import AdapterRows, AdapterTable
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.sampling import RoutingSampler


class StepMapping:
    """The step's adapters, in the rows of a table, and its tokens by row.

    Rows without an adapter, padding among them, are in no tile. There is one object a model; compiled graphs hold the
    object, and its content changes between steps.
    """

    def __init__(self, table: AdapterTable, sampler: RoutingSampler | None = None) -> None:
        self._table = table
        self.sampler = sampler
        self._device = table.rows_LAF.device
        self.clear()

    def clear(self) -> None:
        """No token has an adapter."""
        self.num_tokens = 0
        self._blocks: frozenset[int] = frozenset()
        self._names: dict[int, str] = {}

    def set(self, slot_ids_T: np.ndarray, slot: Callable[[int], Slot]) -> None:
        """Take the slot id of every token, int64 [T], 0 or less for none; `slot` gives the slot of an id.

        One adapter's slots share a row of the table. Raises IndexError for more adapters than the table has rows.
        """
        self.clear()
        self.num_tokens = len(slot_ids_T)
        ids, id_index_T = np.unique(slot_ids_T, return_inverse=True)
        held = {i: slot(int(slot_id)) for i, slot_id in enumerate(ids) if slot_id > 0}
        place_of = self._place({s.adapter.rows for s in held.values() if s.adapter is not None})
        if not place_of:
            return
        self._blocks = frozenset().union(*(rows.active for rows in place_of))
        if self.sampler:
            self._names = {place_of[s.adapter.rows]: s.version for s in held.values() if s.adapter is not None}
        place_of_id, bias_row_of_id = np.full((2, len(ids)), -1)
        for i, its in held.items():
            if its.adapter is not None:
                place_of_id[i], bias_row_of_id[i] = place_of[its.adapter.rows], its.bias_row
        plan = self._plan = self._to_device(
            plan_step(
                place_of_id[id_index_T],
                bias_row_of_id[id_index_T],
                num_rows=self._table.num_rows,
                tile_size=tile_size(self._device, self.num_tokens),
            )
        )
        self._add_path_: AddPath = bind(self._table, plan)

    def add_path_(self, y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        """Add to `y_TD`, in place, the path of block number `block` for every row that has an adapter."""
        if block in self._blocks:
            self._add_path_(y_TD, x_TD, block)
            if self.sampler and self.sampler.due(block):
                self.sampler.observe(x_TD, self._table, block, self._plan, self._names)

    def _place(self, wanted: Set[AdapterRows]) -> dict[AdapterRows, int]:
        """Put the step's adapters in the table, each where it was in the last step, and the others out of it."""
        table = self._table
        place_of: dict[AdapterRows, int] = {}
        free = []
        for place in range(table.num_rows):
            rows = table.held(place)
            if rows is not None and rows in wanted:
                place_of[rows] = place
                continue
            if rows is not None:
                table.place(place, None)
            free.append(place)
        for rows in wanted - place_of.keys():
            place_of[rows] = free.pop()
            table.place(place_of[rows], rows)
        return place_of

    def _to_device(self, plan: StepPlan) -> StepPlan:
        if self._device.type == "cpu":
            return plan

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(self._device, non_blocking=True)

        return StepPlan(move(plan.tokens_P), move(plan.bias_rows_P), move(plan.tiles_M3), plan.tile_size)
