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
    # At the ends, the formula gives 0 and 1 up to rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


# For each seed, (correct, total) of every task, in the same order.
Counts = Sequence[Sequence[tuple[int, int]]]


def bootstrap_mean(counts: Counts) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over seeds and tasks of accuracies.

    Seeds are drawn with replacement, and so are each task's examples: both sources of chance count. With one seed, only
    the examples do.
    """
    rng = np.random.default_rng(0)
    return _interval(_means(counts, _drawn_seeds(len(counts), rng), rng))


def bootstrap_difference(counts: Counts, others: Counts) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `counts` minus the mean of `others`.

    Both have the same seeds in the same order; they are drawn together. Raises ValueError for unequal numbers.
    """
    if len(counts) != len(others):
        raise ValueError(f"{len(counts)} and {len(others)} seeds: expected the same seeds")
    rng = np.random.default_rng(0)
    seeds = _drawn_seeds(len(counts), rng)
    return _interval(_means(counts, seeds, rng) - _means(others, seeds, rng))


def bootstrap_recovery(counts: Counts, lower: Counts, upper: Counts) -> tuple[float, float, float]:
    """(counts - lower) / (upper - lower) of the means over seeds and tasks, and its 95 % bootstrap interval.

    All have the same tasks, and the same seeds in the same order; seeds are drawn together. Raises ValueError for
    unequal numbers, and if the upper bound is not above the lower one.
    """
    if not len(counts) == len(lower) == len(upper):
        raise ValueError(f"{len(counts)}, {len(lower)} and {len(upper)} seeds: expected the same seeds")
    rng = np.random.default_rng(0)
    seeds = _drawn_seeds(len(counts), rng)
    multi, low, high = (_means(each, seeds, rng) for each in (counts, lower, upper))
    mean = [float(np.mean([[c / t for c, t in seed] for seed in each])) for each in (counts, lower, upper)]
    if mean[2] <= mean[1]:
        raise ValueError(f"an upper bound of {mean[2]:.3f} and a lower one of {mean[1]:.3f} leave nothing to recover")
    with np.errstate(divide="ignore", invalid="ignore"):
        return (mean[0] - mean[1]) / (mean[2] - mean[1]), *_interval((multi - low) / (high - low))


def _drawn_seeds(number: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, number, size=(_DRAWS, number))


def _means(counts: Counts, seeds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean of every draw."""
    correct, total = np.moveaxis(np.asarray(counts, dtype=np.int64), -1, 0)
    drawn = rng.binomial(total[seeds], (correct / total)[seeds]) / total[seeds]
    means: np.ndarray = drawn.mean(axis=(1, 2))
    return means


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
