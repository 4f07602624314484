"""Confidence intervals of accuracies.

Shape suffixes: D draws, S seeds, N examples.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    # At 0 and `total`, remove the formula's rounding errors.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


# One entry a seed: (digest of the scored examples, "1" or "0" for each of them) of every task, in the same order.
Marks = Sequence[Sequence[tuple[str, str]]]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, and its value in each bootstrap draw [D].

    All estimates of the same number of seeds share their draws: draw d uses the same seeds and the same examples for
    every method, so differences are paired.
    """

    value: float
    draws_D: np.ndarray
    seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        low, high = np.quantile(self.draws_D, [0.025, 0.975])
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Raises ValueError for another number of seeds."""
        _check_seeds(self, other)
        return Estimate(self.value - other.value, self.draws_D - other.draws_D, self.seeds)


def accuracy(marks: Marks) -> Estimate:
    """The mean over seeds and tasks of accuracies.

    Draws seeds and examples with replacement, the same examples for all seeds, so that the interval covers both sources
    of variation. With one seed, it covers only the examples.
    """
    chosen_DS = np.random.default_rng(0).integers(0, len(marks), size=(_DRAWS, len(marks)))
    values, columns = zip(*(_of_seed(tasks) for tasks in marks), strict=True)
    draws_D = np.take_along_axis(np.stack(columns, axis=1), chosen_DS, axis=1).mean(axis=1)
    return Estimate(float(np.mean(values)), draws_D, len(marks))


def recovery(method: Estimate, lower: Estimate, upper: Estimate) -> Estimate:
    """(method - lower) / (upper - lower).

    Raises ValueError for unequal numbers of seeds, and if the upper bound is not above the lower one.
    """
    _check_seeds(method, lower, upper)
    if upper.value <= lower.value:
        raise ValueError(f"the upper bound {upper.value:.3f} must exceed the lower bound {lower.value:.3f}")
    with np.errstate(divide="ignore", invalid="ignore"):
        draws_D = (method.draws_D - lower.draws_D) / (upper.draws_D - lower.draws_D)
    return Estimate((method.value - lower.value) / (upper.value - lower.value), draws_D, method.seeds)


def _check_seeds(*estimates: Estimate) -> None:
    if len({each.seeds for each in estimates}) > 1:
        raise ValueError(f"{' and '.join(str(each.seeds) for each in estimates)} seeds: expected the same seeds")


def _of_seed(tasks: Sequence[tuple[str, str]]) -> tuple[float, np.ndarray]:
    """One seed's mean over tasks, and that of every draw [D]."""
    # Tasks with the same examples, such as label maps, share their draws.
    shares: dict[str, np.ndarray] = {}
    for examples, right in tasks:
        right_N = np.frombuffer(right.encode(), dtype=np.uint8) == ord("1")
        shares[examples] = shares.get(examples, 0.0) + right_N / (len(right) * len(tasks))
    return (
        float(sum(share_N.sum() for share_N in shares.values())),
        sum((_times_drawn(examples, len(share_N)) @ share_N for examples, share_N in shares.items()), np.zeros(_DRAWS)),
    )


@lru_cache(maxsize=128)
def _times_drawn(examples: str, number: int) -> np.ndarray:
    """How often each example is in each draw [D, N]; the same for the same examples."""
    seed = int.from_bytes(hashlib.sha256(examples.encode()).digest()[:8], "big")
    drawn_DN = np.random.default_rng(seed).integers(0, number, size=(_DRAWS, number))
    places_DN = drawn_DN + number * np.arange(_DRAWS)[:, None]
    return np.bincount(places_DN.ravel(), minlength=_DRAWS * number).reshape(_DRAWS, number).astype(np.uint16)
