"""Which tokens belong to which slot: sorted into tiles once a step, read by every block.

A tile is up to `tile_size` tokens of one slot. Tokens without an adapter are in none.

Shape suffixes: T tokens, M tiles.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class StepPlan:
    """A step's tokens by slot; int32, contiguous, on the device of the step.

    tokens_T: row of the batch, slot by slot.
    bias_rows_T: row of the adapter's bias table for each of those, -1 for none.
    tiles_M3: (slot, first place in tokens_T, count). Tiles of count 0 are padding.
    tile_size: the largest count there may be.
    """

    tokens_T: torch.Tensor
    bias_rows_T: torch.Tensor
    tiles_M3: torch.Tensor
    tile_size: int


def plan_step(slot_T: np.ndarray, bias_row_T: np.ndarray, *, num_slots: int, tile_size: int) -> StepPlan:
    """Sort a step's tokens into tiles, on the host. slot_T, bias_row_T: integers [T], -1 for none.

    A slot's tiles are of one size, give or take a token. Raises ValueError for slots out of range.
    """
    if slot_T.shape != bias_row_T.shape or slot_T.ndim != 1:
        raise ValueError(f"slots and bias rows must be one a token, got {slot_T.shape} and {bias_row_T.shape}")
    if slot_T.size and not (slot_T.min() >= -1 and slot_T.max() < num_slots):
        raise ValueError(f"slots {slot_T.min()}..{slot_T.max()}, the table has 0..{num_slots - 1}, and -1 is none")
    order_T = np.argsort(slot_T, kind="stable")
    order_T = order_T[slot_T[order_T] >= 0]
    slots, starts, counts = np.unique(slot_T[order_T], return_index=True, return_counts=True)
    tiles_of_slot = -(-counts // tile_size)
    nth = np.arange(tiles_of_slot.sum()) - np.repeat(np.cumsum(tiles_of_slot) - tiles_of_slot, tiles_of_slot)
    counts_M, split_M = np.repeat(counts, tiles_of_slot), np.repeat(tiles_of_slot, tiles_of_slot)
    first_M, last_M = nth * counts_M // split_M, (nth + 1) * counts_M // split_M
    tiles_M3 = np.stack(
        [np.repeat(slots, tiles_of_slot), np.repeat(starts, tiles_of_slot) + first_M, last_M - first_M], axis=1
    )
    tokens_T, bias_rows_T, tiles = (
        torch.from_numpy(array.astype(np.int32)) for array in (order_T, bias_row_T[order_T], tiles_M3)
    )
    return StepPlan(tokens_T, bias_rows_T, tiles, tile_size)


class DevicePlan:
    """A plan in buffers of fixed size and address on a GPU, for graphs that are captured once and replayed.

    max_tokens, max_slots: bounds of a step; they fix the number of tiles, and with it every grid.
    """

    def __init__(self, max_tokens: int, max_slots: int, *, tile_size: int, device: torch.device) -> None:
        self._max_tokens, self._max_slots = max_tokens, max_slots
        # Every slot ends in at most one tile that is not full.
        num_tiles = min(max_tokens, max_slots + max_tokens // tile_size)
        self._all = torch.zeros(2 * max_tokens + 3 * num_tiles, dtype=torch.int32, device=device)
        tokens, bias_rows, tiles = self._all.split([max_tokens, max_tokens, 3 * num_tiles])
        self.plan = StepPlan(tokens, bias_rows, tiles.view(num_tiles, 3), tile_size)

    def set(self, slot_T: np.ndarray, bias_row_T: np.ndarray) -> StepPlan:
        """Fill the buffers for a step of up to `max_tokens` tokens, by one copy that waits for nothing.

        Raises ValueError for more tokens or slots than that; the buffers are as they were then.
        """
        if len(slot_T) > self._max_tokens:
            raise ValueError(f"{len(slot_T)} tokens in a plan of {self._max_tokens}")
        step = plan_step(slot_T, bias_row_T, num_slots=self._max_slots, tile_size=self.plan.tile_size)
        # A new staging buffer each time: the copy of the last step may still be under way.
        staged = torch.zeros(self._all.shape, dtype=torch.int32, pin_memory=self._all.is_cuda)
        staged[: len(step.tokens_T)] = step.tokens_T
        staged[self._max_tokens : self._max_tokens + len(step.bias_rows_T)] = step.bias_rows_T
        staged[2 * self._max_tokens : 2 * self._max_tokens + step.tiles_M3.numel()] = step.tiles_M3.flatten()
        self._all.copy_(staged, non_blocking=True)
        return self.plan
