"""Which tokens belong to which row of the table: sorted into tiles once a step, read by every block.

A tile is up to `tile_size` tokens of one row. Tokens without an adapter are in no tile.

Shape suffixes: T tokens, P planned tokens (those with an adapter), M tiles.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class StepPlan:
    """A step's tokens by row of the table; int32, contiguous, on the device of the step.

    tokens_P: place in the batch, row by row of the table.
    bias_rows_P: row of the adapter's bias table for each of these tokens, -1 for none.
    tiles_M3: (row, first place in tokens_P, count). Tiles of count 0 are padding.
    tile_size: the largest count there may be.
    """

    tokens_P: torch.Tensor
    bias_rows_P: torch.Tensor
    tiles_M3: torch.Tensor
    tile_size: int


def plan_step(row_T: np.ndarray, bias_row_T: np.ndarray, *, num_rows: int, tile_size: int) -> StepPlan:
    """Sort a step's tokens into tiles, on the host. row_T, bias_row_T: integers [T], -1 for none.

    A row's tiles are of one size, give or take a token. Raises ValueError for rows out of range.
    """
    if row_T.shape != bias_row_T.shape or row_T.ndim != 1:
        raise ValueError(f"rows and bias rows must be one a token, got {row_T.shape} and {bias_row_T.shape}")
    if row_T.size and not (row_T.min() >= -1 and row_T.max() < num_rows):
        raise ValueError(f"rows {row_T.min()}..{row_T.max()}, the table has 0..{num_rows - 1}, and -1 is none")
    order_T = np.argsort(row_T, kind="stable")
    order_T = order_T[row_T[order_T] >= 0]
    rows, starts, counts = np.unique(row_T[order_T], return_index=True, return_counts=True)
    tiles_of_row = -(-counts // tile_size)
    nth = np.arange(tiles_of_row.sum()) - np.repeat(np.cumsum(tiles_of_row) - tiles_of_row, tiles_of_row)
    counts_M, split_M = np.repeat(counts, tiles_of_row), np.repeat(tiles_of_row, tiles_of_row)
    first_M, last_M = nth * counts_M // split_M, (nth + 1) * counts_M // split_M
    tiles_M3 = np.stack(
        [np.repeat(rows, tiles_of_row), np.repeat(starts, tiles_of_row) + first_M, last_M - first_M], axis=1
    )
    tokens_P, bias_rows_P, tiles = (
        torch.from_numpy(array.astype(np.int32)) for array in (order_T, bias_row_T[order_T], tiles_M3)
    )
    return StepPlan(tokens_P, bias_rows_P, tiles, tile_size)


class DevicePlan:
    """A plan in buffers of fixed size and address on a GPU, for captured graphs.

    max_tokens, max_rows: bounds of a step; they fix the number of tiles, and with it every grid.
    """

    def __init__(self, max_tokens: int, max_rows: int, *, tile_size: int, device: torch.device) -> None:
        self._max_tokens, self._max_rows = max_tokens, max_rows
        # Every row has at most one tile that is not full.
        num_tiles = min(max_tokens, max_rows + max_tokens // tile_size)
        self._all = torch.zeros(2 * max_tokens + 3 * num_tiles, dtype=torch.int32, device=device)
        tokens, bias_rows, tiles = self._all.split([max_tokens, max_tokens, 3 * num_tiles])
        self.plan = StepPlan(tokens, bias_rows, tiles.view(num_tiles, 3), tile_size)

    def set(self, row_T: np.ndarray, bias_row_T: np.ndarray) -> StepPlan:
        """Fill the buffers for a step of up to `max_tokens` tokens, with one asynchronous copy.

        Raises ValueError for more tokens or rows than that, and leaves the buffers unchanged.
        """
        if len(row_T) > self._max_tokens:
            raise ValueError(f"{len(row_T)} tokens in a plan of {self._max_tokens}")
        step = plan_step(row_T, bias_row_T, num_rows=self._max_rows, tile_size=self.plan.tile_size)
        # A new staging buffer each time: the last step's copy may still be running.
        staged = torch.zeros(self._all.shape, dtype=torch.int32, pin_memory=self._all.is_cuda)
        staged[: len(step.tokens_P)] = step.tokens_P
        staged[self._max_tokens : self._max_tokens + len(step.bias_rows_P)] = step.bias_rows_P
        staged[2 * self._max_tokens : 2 * self._max_tokens + step.tiles_M3.numel()] = step.tiles_M3.flatten()
        self._all.copy_(staged, non_blocking=True)
        return self.plan
