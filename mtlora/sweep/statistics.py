"""Confidence intervals of accuracies."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964  # 95 %
_DRAWS = 2000


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927). Raises ValueError unless 0 <= correct <= total."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total}: expected 0 <= correct <= total, and some")
    p, z2 = correct / total, _Z**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def bootstrap_mean(counts: Sequence[Sequence[tuple[int, int]]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over seeds and tasks of accuracies.

    counts: one sequence a seed of (correct, total), a task each, in the same order. Seeds are drawn with replacement,
    and of each task its examples, so both sources of chance count; with one seed it is the examples' alone.
    """
    correct, total = np.moveaxis(np.asarray(counts, dtype=np.int64), -1, 0)
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, len(correct), size=(_DRAWS, len(correct)))
    drawn = rng.binomial(total[seeds], (correct / total)[seeds]) / total[seeds]
    low, high = np.quantile(drawn.mean(axis=(1, 2)), [0.025, 0.975])
    return float(low), float(high)
