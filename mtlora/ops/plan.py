"""A step's tokens sorted by row of the table and cut into tiles: made once per step, read by every block.

A tile is up to `tile_size` tokens of one row. Tokens without an adapter are in no tile.

A plan is one array of integers: a header, the tiles, the tokens, their bias rows. A step without adapters has an empty
plan, because a captured graph may replay launches that read it.

Shape suffixes: T tokens, P planned tokens (those with an adapter), M tiles, W words of a plan, A rows of the table,
C counts of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from mtlora.ops import tuning
from mtlora.ops.tuning import PIECES, RUNS, KernelConfig


class Header(IntEnum):
    """Indices of a plan's first words; `triton_gpu.py` uses the same numbers."""

    TILES = 0
    TOKENS = 1  # planned ones
    PARTS = 2  # of x's dimensions, in the shrink's sums
    COLUMNS = 3  # most columns of [A; R] of the live rows
    ITEMS = 4  # most runs of pieces of y of a live row, for each size of `PIECES`
    SAMPLE_BLOCK = 7  # the block whose routing this step samples, -1 for none
    SAMPLE_TILE = 8
    RUN = 9  # pieces of a group that a program computes at a time, for each size of `PIECES`


HEADER_WORDS = 16
TILE_WORDS = 3


@dataclass(frozen=True)
class StepPlan:
    """A step's tokens by row of the table, on the host; int32.

    words_W: the plan as kernels on a GPU read it; num_tiles: M; num_planned: P.
    tokens_P: the tokens' positions in the batch, sorted by row of the table.
    bias_rows_P: for each of these tokens, its row of the adapter's bias table, -1 for none.
    tiles_M3: (row, first place in tokens_P, count).
    """

    words_W: np.ndarray
    num_tiles: int
    num_planned: int

    @property
    def tiles_M3(self) -> torch.Tensor:
        """(row, first index in tokens_P, count) of every tile."""
        end = HEADER_WORDS + TILE_WORDS * self.num_tiles
        return torch.from_numpy(self.words_W[HEADER_WORDS:end]).view(-1, TILE_WORDS)

    @property
    def tokens_P(self) -> torch.Tensor:
        """The tokens' positions in the batch."""
        return torch.from_numpy(self.words_W[len(self.words_W) - 2 * self.num_planned :][: self.num_planned])

    @property
    def bias_rows_P(self) -> torch.Tensor:
        """The tokens' rows in their adapter's bias table."""
        return torch.from_numpy(self.words_W[len(self.words_W) - self.num_planned :])


def plan_step(row_T: np.ndarray, bias_row_T: np.ndarray, *, num_rows: int, tile_size: int) -> StepPlan:
    """Sort a step's tokens into tiles, on the host. row_T, bias_row_T: integers [T], -1 for none.

    The tiles of a row differ by at most one token. The header's counts for a GPU are zeros. Raises ValueError for
    rows out of range.
    """
    if row_T.shape != bias_row_T.shape or row_T.ndim != 1:
        raise ValueError(f"rows and bias rows must be one a token, got {row_T.shape} and {bias_row_T.shape}")
    if row_T.size and not (row_T.min() >= -1 and row_T.max() < num_rows):
        raise ValueError(f"rows {row_T.min()}..{row_T.max()}, the table has 0..{num_rows - 1}, and -1 is none")
    # Sort by row; tokens without a row come first.
    counts_A = np.bincount(row_T + 1, minlength=1)
    order_P = np.argsort(row_T, kind="stable")[counts_A[0] :]
    rows = np.flatnonzero(counts_A[1:])
    counts = counts_A[1:][rows]
    tiles_of_row = -(-counts // tile_size)
    num_tiles, P = int(tiles_of_row.sum()), len(order_P)
    words_W = np.empty(HEADER_WORDS + TILE_WORDS * num_tiles + 2 * P, dtype=np.int32)
    words_W[:HEADER_WORDS] = 0
    words_W[Header.TILES], words_W[Header.TOKENS], words_W[Header.SAMPLE_BLOCK] = num_tiles, P, -1
    tiles_M3 = words_W[HEADER_WORDS : HEADER_WORDS + TILE_WORDS * num_tiles].reshape(-1, TILE_WORDS)
    of_M = np.repeat(np.arange(len(rows)), tiles_of_row)
    nth_M = np.arange(num_tiles) - (np.cumsum(tiles_of_row) - tiles_of_row)[of_M]
    counts_M, split_M = counts[of_M], tiles_of_row[of_M]
    first_M = nth_M * counts_M // split_M
    tiles_M3[:, 0] = rows[of_M]
    tiles_M3[:, 1] = (np.cumsum(counts) - counts)[of_M] + first_M
    tiles_M3[:, 2] = (nth_M + 1) * counts_M // split_M - first_M
    words_W[len(words_W) - 2 * P : len(words_W) - P] = order_P
    words_W[len(words_W) - P :] = bias_row_T[order_P]
    return StepPlan(words_W, num_tiles, P)


def counts_of(sizes: Sequence[tuple[int, int, int]], hidden_size: int) -> np.ndarray:
    """Counts of one adapter for a GPU's header, int32 [C]; sizes: (rank, experts, groups) of its blocks.

    First the most columns of [A; R]; then, for each of `PIECES` and each of `RUNS`, the most runs of pieces of y.
    """
    if not sizes:
        return np.zeros(1 + len(PIECES) * len(RUNS), dtype=np.int32)
    counted = [
        [tuning.padded(r + G * N)]
        + [G * -(-(hidden_size // G) // (piece * run)) for piece in PIECES for run in RUNS]
        for r, N, G in sizes
    ]  # fmt: skip
    return np.max(counted, axis=0).astype(np.int32)


def count_for_gpu(plan: StepPlan, counts_AC: np.ndarray, config: KernelConfig) -> None:
    """Write the header's counts for a GPU. counts_AC: `counts_of` the adapter in each row of the table."""
    words_W, tiles = plan.words_W, plan.num_tiles
    columns, *items = counts_AC[words_W[HEADER_WORDS : HEADER_WORDS + TILE_WORDS * tiles : TILE_WORDS]].max(0).tolist()
    words_W[Header.COLUMNS] = columns
    words_W[Header.PARTS] = tuning.parts(config, tiles, columns, plan.num_planned)
    programs = tuning.num_programs(config)
    for i in range(len(PIECES)):
        of_runs = items[i * len(RUNS) : (i + 1) * len(RUNS)]
        # Use longer runs only if there are more items than programs.
        at = next((at for at, number in enumerate(of_runs) if tiles * number <= programs), len(RUNS) - 1)
        words_W[Header.ITEMS + i], words_W[Header.RUN + i] = of_runs[at], RUNS[at]


class DevicePlan:
    """A plan in a buffer of fixed address on a GPU, for captured graphs, and the pinned buffers that feed it.

    words_W: the buffer. A plan is usually shorter; kernels do not read the old words behind it.
    """

    def __init__(self, config: KernelConfig, device: torch.device, ring: int = 4) -> None:
        self._config = config
        # A tile has at least one token, so there are at most `max_tokens` tiles.
        size = HEADER_WORDS + TILE_WORDS * config.max_tokens + 2 * config.max_tokens
        self.words_W = torch.zeros(size, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self._staged = [torch.empty(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(ring)]
        self._arrays = [staged.numpy() for staged in self._staged]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in range(ring)]
        self._next = 0
        self.set(plan_step(np.empty(0, int), np.empty(0, int), num_rows=0, tile_size=1), np.zeros((0, 0), np.int32))

    def set(self, plan: StepPlan, counts_AC: np.ndarray, sample: tuple[int, int] | None = None) -> None:
        """Queue a copy of the plan on the running stream, and return at once.

        counts_AC: `counts_of` the adapter in each row of the table. sample: block and tile whose routing the kernel
        writes to `samples`. Raises ValueError for a plan of more tokens than the config allows, and leaves the buffer
        unchanged.
        """
        words_W = plan.words_W
        if plan.num_planned > self._config.max_tokens:
            raise ValueError(f"{plan.num_planned} tokens in a plan of {self._config.max_tokens}")
        if plan.num_tiles:
            count_for_gpu(plan, counts_AC, self._config)
        if sample:
            words_W[Header.SAMPLE_BLOCK], words_W[Header.SAMPLE_TILE] = sample
        turn = self._next = (self._next + 1) % len(self._staged)
        copied = self._copied[turn]
        if copied is not None:
            # This waits only if the device is a full ring of steps behind.
            copied.synchronize()
        self._arrays[turn][: len(words_W)] = words_W
        self.words_W[: len(words_W)].copy_(self._staged[turn][: len(words_W)], non_blocking=True)
        if copied is not None:
            copied.record()
