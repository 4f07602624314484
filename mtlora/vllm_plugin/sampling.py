"""Samples how tokens are routed: entropy, and the use of each expert.

Off unless MTLORA_ROUTING_SAMPLE_STEPS is set. Every so many steps, torch operations compute one block's routing of a
few tokens again, beside the kernel that serves them. Blocks take turns.

Shape suffixes: T tokens, D hidden size, G groups, N experts.
"""

import math
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from mtlora.ops.packed_block import PackedBlock, route
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import AdapterTable

ENVIRONMENT_STEPS = "MTLORA_ROUTING_SAMPLE_STEPS"
# Most tokens of a sample, all of one tile and so of one adapter: bounds its cost.
_TOKENS = 8


@dataclass
class RoutingSums:
    """Sums over sampled rows, each a token and a group: of entropy as a share of log N, and of the weights."""

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
        turn, rest = divmod(self._step, self._steps)
        return rest == 0 and block == turn % self._num_blocks

    def observe(
        self, x_TD: torch.Tensor, table: AdapterTable, block: int, plan: StepPlan, names: dict[int, str]
    ) -> None:
        """Sample one tile of the plan; `names` gives the adapter version in each row of the table."""
        tile = self._step // self._steps // self._num_blocks % max(1, len(plan.tiles_M3))
        row, first, count = plan.tiles_M3[tile].tolist() if len(plan.tiles_M3) else (0, 0, 0)
        held = table.held(row) if count else None
        packed = held.block(block) if held else None
        if packed is None:
            return
        taken = slice(first, first + min(count, _TOKENS))
        x_TD = x_TD[plan.tokens_P[taken].long()]
        weights_TGN = routing(x_TD, packed, plan.bias_rows_P[taken])
        share = entropy(weights_TGN) / math.log(packed.num_experts) if packed.num_experts > 1 else entropy(weights_TGN)
        used_N = weights_TGN.sum((0, 1)).tolist()
        sums = self._sums.setdefault(names[row], RoutingSums())
        sums.rows += weights_TGN.shape[0] * weights_TGN.shape[1]
        sums.entropy += float(share.sum())
        # A version's name can return with other content, and so with another number of experts.
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
