"""Counts the work of a block's two launches for a plan: items, bytes, products.

It mirrors the loops of `mtlora/ops/triton_gpu.py`; a test compares it with the counts of `tests/benchmarks/traffic.py`.
Bytes are a program's loads and stores through the L2 cache; memory delivers each adapter's weights once.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.backbones import AdapterShape
from mtlora.ops import tuning
from mtlora.ops.plan import Header, StepPlan, count_for_gpu, counts_of, plan_step
from mtlora.ops.tuning import PIECES, KernelConfig, padded


@dataclass(frozen=True)
class Work:
    """One launch. items: what programs loop over; products: of tiles, in one item.

    weights, inputs, scratch, stored: bytes that items load of weights, of x or y, of s; bytes that they store.
    memory: bytes of weights that memory must deliver.
    """

    items: int
    products: int
    weights: int
    inputs: int
    scratch: int
    stored: int
    memory: int

    @property
    def cached(self) -> int:
        """Bytes that pass the L2 cache."""
        return self.weights + self.inputs + self.scratch + self.stored


def step_plan(config: KernelConfig, shape: AdapterShape, tokens: int, live: int) -> StepPlan:
    """The plan of a step whose tokens take turns among `live` adapters; with the header that a GPU reads."""
    plan = plan_step(
        np.arange(tokens) % live, np.full(tokens, -1), num_rows=live, tile_size=tuning.tile_size(tokens)
    )  # fmt: skip
    counts_C = counts_of([(shape.rank, shape.experts, shape.groups)], config.hidden_size)
    count_for_gpu(plan, np.tile(counts_C, (live, 1)), config)
    return plan


def of_block(config: KernelConfig, shape: AdapterShape, tokens: int, live: int) -> tuple[Work, Work]:
    """(shrink, expand) of one block, beside which `live` adapters of a shape have paths."""
    way, plan = tuning.cut(config, tokens), step_plan(config, shape, tokens, live)
    header = plan.words_W
    D, b, tiles = config.hidden_size, config.dtype.itemsize, plan.num_tiles
    columns, parts = padded(shape.columns), min(int(header[Header.PARTS]), way.max_parts)
    pieces_s = -(-columns // way.block_s)
    number = min(live, tokens)
    shrink = Work(
        items=tiles * parts * pieces_s,
        products=-(-D // (way.block_d * parts)),
        weights=tiles * D * columns * b,
        inputs=tokens * D * b * pieces_s,
        scratch=0,
        stored=tokens * columns * parts * 4,
        memory=number * D * columns * b,
    )
    width = D // shape.groups
    pieces_of_group = -(-width // way.block_e)
    pieces = shape.groups * pieces_of_group
    size = PIECES.index(way.block_e)
    run = min(int(header[Header.RUN + size]), pieces_of_group)
    chunks = -(-shape.rank // 16)
    passes = chunks * -(-shape.experts // way.block_n)
    # Sectors of s that a token loads: an item loads the logits once, a piece loads h, and each pass its logits again.
    of_item, of_piece = -(-shape.experts // 8), -(-shape.rank // 8) + passes * -(-min(way.block_n, shape.experts) // 8)
    sectors = of_item * int(header[Header.ITEMS + size]) + of_piece * pieces
    expand = Work(
        items=tiles * int(header[Header.ITEMS + size]),
        products=passes * run,
        weights=tiles * shape.experts * shape.rank * shape.groups * padded(width) * b,
        inputs=tokens * D * b,
        scratch=tokens * parts * sectors * 32,
        stored=tokens * D * b,
        memory=number * D * shape.experts * shape.rank * b,
    )
    return shrink, expand
