"""The cost of a step of one replica, fitted to load-test results.

    step seconds = base + per_sequence * sequences + per_prompt_token * prompt tokens + per_adapter * distinct adapters

A request adds `overhead` outside the engine: transport, tokenizing, one event loop. The model is linear so that it can
be fitted by non-negative least squares to what every load test records.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.capacity import CapacityError
from deploy.capacity.result import Level


@dataclass(frozen=True)
class ServiceModel:
    """Seconds of a step by its parts. overhead: seconds of a request outside the engine."""

    base: float
    per_sequence: float
    per_prompt_token: float
    per_adapter: float = 0.0
    overhead: float = 0.0
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048

    def step(self, sequences: int, prompt_tokens: int, adapters: int) -> float:
        """Seconds of a step."""
        return (
            self.base
            + self.per_sequence * sequences
            + self.per_prompt_token * prompt_tokens
            + self.per_adapter * adapters
        )

    def saturated_rate(self, prompt_tokens: float, completion_tokens: float, adapters: float = 1.0) -> float:
        """Requests a second of a full replica, for mean lengths and `adapters` distinct adapters a step."""
        n = self.max_num_seqs
        per_token = (self.base + self.per_adapter * min(adapters, n)) / n + self.per_sequence
        return 1.0 / (completion_tokens * per_token + self.per_prompt_token * prompt_tokens)


def fit(levels: Sequence[Level], *, max_num_seqs: int = 64) -> ServiceModel:
    """Fit to closed loops at several concurrencies. Raises CapacityError if they cannot tell the costs apart.

    At each level the loop's throughput X fixes the mean time between a sequence's tokens, and X times the mean prompt
    the prompt tokens that a step reads on the side. Little's law gives the mean number of sequences in the engine.
    """
    if len({each.in_flight for each in levels}) < 2:
        raise CapacityError("the results are of one concurrency; a service model needs at least two, such as 1 and 32")
    rows: list[list[float]] = []
    wanted: list[float] = []
    for each in levels:
        prompt = np.array([a.prompt_tokens for a in each.answered], float)
        tokens = np.array([a.completion_tokens for a in each.answered], float)
        decode = np.array([a.seconds - a.ttft for a in each.answered])
        steps = tokens - 1
        if steps.sum() <= 0:
            raise CapacityError("every answer has one token; the cost of a decode step cannot be told")
        between_tokens = decode.sum() / steps.sum()
        sequences = min(float(max_num_seqs), each.throughput * float(np.mean([a.seconds for a in each.answered])))
        prompt_tokens = each.throughput * between_tokens * prompt.mean()
        # Prompts are read during decode steps: one equation a level.
        rows.append([1.0, float(sequences), float(prompt_tokens), 0.0])
        wanted.append(float(between_tokens))
        if each.in_flight == 1:
            # A request alone pays one step over its prompt, and the overhead, for its first token.
            rows += [[1.0, 1.0, float(p), 1.0] for p in prompt]
            wanted += [a.ttft for a in each.answered]
    # A level weighs as much as all single requests together.
    weights = np.array([len(levels[0].answered) ** 0.5 if row[3] == 0 else 1.0 for row in rows]) / np.array(wanted)
    solution = _non_negative(np.array(rows) * weights[:, None], np.array(wanted) * weights)
    base, per_sequence, per_prompt_token, overhead = map(float, solution)
    if base + per_sequence <= 0:
        raise CapacityError("the results give a step no cost; they are not of a server under load")
    return ServiceModel(base, per_sequence, per_prompt_token, overhead=overhead, max_num_seqs=max_num_seqs)


def _non_negative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Non-negative least squares for a few unknowns: the best solution over all subsets of them."""
    best, least = np.zeros(a.shape[1]), float("inf")
    for subset in range(1, 1 << a.shape[1]):
        columns = [i for i in range(a.shape[1]) if subset >> i & 1]
        solution, *_ = np.linalg.lstsq(a[:, columns], b, rcond=None)
        error = float(((a[:, columns] @ solution - b) ** 2).sum())
        if (solution >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(a.shape[1]), error
            best[columns] = solution
    return best


def read_model(path: Path) -> ServiceModel:
    """Read a model that `fit` wrote. Raises CapacityError."""
    try:
        return ServiceModel(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CapacityError(f"{path}: not a service model: {error}") from None
