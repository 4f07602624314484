"""Samples the routing of tokens: its entropy, and the use of each expert.

Off unless MTLORA_ROUTING_SAMPLE_STEPS is set. Once in that number of steps, one block's routing of a few tokens is
sampled. On a CPU, torch operations compute it again, beside the kernel that serves them. On a GPU the kernel itself
writes it down (`gpu_step.py`). Blocks take turns.

Shape suffixes: T tokens, D hidden size, G groups, N experts.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from mtlora.ops.packed_block import PackedBlock, route
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import AdapterTable
from mtlora.vllm_plugin.packed import Slot

ENVIRONMENT_STEPS = "MTLORA_ROUTING_SAMPLE_STEPS"
# Most tokens of a sample, all of one tile and so of one adapter: bounds its cost.
_TOKENS = 8


@dataclass
class RoutingSums:
    """Sums over sampled rows, each a token and a group: entropy as a share of log N, and the weights."""

    rows: int = 0
    entropy: float = 0.0
    expert_weights: list[float] = field(default_factory=list)


class RoutingSampler:
    """Samples every `steps` steps; one object a model."""

    def __init__(self, steps: int, num_blocks: int) -> None:
        self._steps = steps
        self._num_blocks = num_blocks
        self._step = 0
        self._last_block = -1
        self._sums: dict[str, RoutingSums] = {}

    @staticmethod
    def from_environment(num_blocks: int) -> "RoutingSampler | None":
        """The sampler that the environment asks for, if any. Raises ValueError for a value that is no number."""
        steps = int(os.environ.get(ENVIRONMENT_STEPS) or 0)
        return RoutingSampler(steps, num_blocks) if steps > 0 else None

    def due(self, block: int) -> bool:
        """Whether this step samples this block. Call it once a block, in the order in which they run."""
        if block <= self._last_block:
            self._step += 1
        self._last_block = block
        return self._step % self._steps == 0 and block == self.place(1)[0]

    def next_step(self) -> bool:
        """Whether the step that begins samples a block, `place`. An alternative to `due`."""
        self._step += 1
        return self._step % self._steps == 0

    def place(self, num_tiles: int) -> tuple[int, int]:
        """The block and the tile that this step samples."""
        turn = self._step // self._steps
        return turn % self._num_blocks, turn // self._num_blocks % max(1, num_tiles)

    def observe(
        self, x_TD: torch.Tensor, table: AdapterTable, block: int, plan: StepPlan, slots: Mapping[int, Slot]
    ) -> None:
        """Sample one tile of the plan; `slots` has one of each row of the table."""
        row, first, count = plan.tiles_M3[self.place(plan.num_tiles)[1]].tolist()
        held = table.held(row)
        packed = held.block(block) if held else None
        if packed is None:
            return
        taken = slice(first, first + min(count, _TOKENS))
        x_TD = x_TD[plan.tokens_P[taken].long()]
        self.add(slots[row].version, routing(x_TD, packed, plan.bias_rows_P[taken]))

    def add(self, name: str, weights_TGN: torch.Tensor) -> None:
        """Add a sample of an adapter version's routing, on the host."""
        num_experts = weights_TGN.shape[-1]
        share = entropy(weights_TGN) / math.log(num_experts) if num_experts > 1 else entropy(weights_TGN)
        used_N = weights_TGN.sum((0, 1)).tolist()
        sums = self._sums.setdefault(name, RoutingSums())
        sums.rows += weights_TGN.shape[0] * weights_TGN.shape[1]
        sums.entropy += float(share.sum())
        # A version name may come back with other content, and so with another number of experts.
        sums.expert_weights = [old + new for old, new in zip_longest(sums.expert_weights, used_N, fillvalue=0.0)]

    def sums(self) -> dict[str, dict[str, Any]]:
        """The sums so far, by adapter version."""
        return {name: vars(sums).copy() for name, sums in self._sums.items()}


def routing(x_TD: torch.Tensor, block: PackedBlock, bias_rows_T: torch.Tensor) -> torch.Tensor:
    """The router's weights [T, G, N] for tokens of one adapter; bias row -1 means no bias."""
    logits_TGN = (x_TD @ block.shrink_DS[:, block.rank :]).reshape(-1, block.num_groups, block.num_experts)
    if block.bias_bGN is None:
        return route(logits_TGN, None)
    bias_TGN = block.bias_bGN[bias_rows_T.clamp(min=0).long()] * (bias_rows_T >= 0).view(-1, 1, 1)
    return route(logits_TGN, bias_TGN)


def entropy(weights_TGN: torch.Tensor) -> torch.Tensor:
    """The entropy of each row, [T, G] in nats."""
    return -(weights_TGN * weights_TGN.clamp(min=1e-30).log()).sum(-1)
