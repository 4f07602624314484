"""Intervals of accuracies against published values, hand-computed cases, a plain bootstrap, and their coverage."""

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.sweep.statistics import Marks, accuracy, recovery, wilson


def _marks(*shares: float, total: int = 1000) -> Marks:
    """Marks of one task: for each seed, the first `share` of the examples are right."""
    return [[("a", "1" * round(share * total) + "0" * (total - round(share * total)))] for share in shares]


def test_wilson_equals_published_intervals() -> None:
    """Ten of twenty, none, and all: values of Newcombe (1998) and of the formula at the ends."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    for correct, total in [(0, 0), (3, 2), (-1, 4)]:
        with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
            wilson(correct, total)


def test_an_interval_narrows_with_examples_and_widens_with_seeds() -> None:
    few, many = (accuracy([[("a", "1" * (n // 2) + "0" * (n // 2)), ("b", "1" * (8 * n // 10) + "0" * (n // 5))]])
                 for n in (10, 1000))  # fmt: skip
    widths = []
    for found in (few, many):
        low, high = found.interval
        assert low < found.value < high
        assert found.value == pytest.approx(0.65)
        widths.append(high - low)
    assert widths[1] < 0.3 * widths[0]
    low, high = accuracy(_marks(0.2, 0.5, 0.8)).interval
    assert high - low > 0.3
    assert accuracy([[("a", "1" * 10)]]).interval == pytest.approx((1.0, 1.0))


def test_a_difference_is_of_the_same_seeds_and_the_same_examples() -> None:
    # Both methods vary with the seed in the same way, so their difference does not vary.
    better, worse = _marks(0.4, 0.8), _marks(0.3, 0.7)
    difference = accuracy(better) - accuracy(worse)
    low, high = difference.interval
    assert 0.05 < low < difference.value < high < 0.15
    assert difference.value == pytest.approx(0.1)
    assert accuracy(better).interval[0] < accuracy(worse).interval[1]
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        accuracy(better) - accuracy(worse[:1])
    # Equal answers differ in no draw, even with few examples.
    assert (accuracy([[("a", "1010")]]) - accuracy([[("a", "1010")]])).interval == (0.0, 0.0)
    # One of four differs: it is drawn binomially, of 4 with 1/4. At most 2 have 0.949, at most 3 have 0.996.
    assert (accuracy([[("a", "1110")]]) - accuracy([[("a", "1100")]])).interval == pytest.approx((0.0, 0.75))
    # Two seeds with opposite differences: half of all draws take one seed twice.
    assert (accuracy(_marks(1, 0)) - accuracy(_marks(0, 1))).interval == pytest.approx((-1, 1))


def test_tasks_of_the_same_examples_are_drawn_together() -> None:
    right = "1" * 10 + "0" * 10
    same = accuracy([[("a", right)] * 64])
    assert same.interval == pytest.approx(accuracy([[("a", right)]]).interval)
    others = accuracy([[(f"a{i}", right) for i in range(64)]])
    low, high = others.interval
    assert high - low < 0.2 * (same.interval[1] - same.interval[0])


def _plain(cells: list[Marks], statistic: Callable[..., float], rng: random.Random) -> tuple[float, float]:
    """The interval by a plain bootstrap: each draw takes seeds, and each task's examples once for all seeds."""
    found = []
    for _ in range(4000):
        seeds = [rng.randrange(len(cells[0])) for _ in cells[0]]
        drawn = [rng.choices(range(len(right)), k=len(right)) for _, right in cells[0][0]]
        means = []
        for cell in cells:
            shares = [
                sum(cell[seed][task][1][i] == "1" for i in places) / len(places)
                for seed in seeds
                for task, places in enumerate(drawn)
            ]
            means.append(sum(shares) / len(shares))
        found.append(statistic(*means))
    found.sort()
    return found[100], found[3899]


def test_intervals_equal_those_of_a_plain_bootstrap() -> None:
    rng = random.Random(1)

    def drawn(share: float) -> Marks:
        return [
            [(task, "".join("01"[rng.random() < share] for _ in range(n))) for task, n in (("a", 40), ("b", 25))]
            for _ in range(3)
        ]

    low, method, high = drawn(0.3), drawn(0.6), drawn(0.9)
    a, b, c = accuracy(low), accuracy(method), accuracy(high)
    for estimate, cells, statistic in (
        (b, [method], lambda m: m),
        (b - a, [method, low], lambda m, n: m - n),
        (recovery(b, a, c), [method, low, high], lambda m, n, o: (m - n) / (o - n)),
    ):
        assert estimate.interval == pytest.approx(_plain(cells, statistic, rng), abs=0.03)


def test_95_of_100_intervals_of_a_difference_hold_it() -> None:
    """Answers of both methods depend on the image's difficulty: paired intervals are as wide as they say, no wider."""
    rng = np.random.default_rng(0)
    held, paired, apart = [], [], []
    for trial in range(300):
        difficulty_N = rng.random(60)
        marks = [
            [(str(trial), "".join(map(str, (difficulty_N + 0.1 * rng.normal(size=60) < skill).astype(int))))]
            for skill in (0.6, 0.5)
        ]
        first, second = (accuracy([each]) for each in marks)
        low, high = (first - second).interval
        held.append(low <= 0.1 <= high)
        paired.append(high - low)
        lone, other = (end - start for start, end in (first.interval, second.interval))
        apart.append(np.hypot(lone, other))
    assert 0.90 <= np.mean(held) <= 0.98
    assert np.mean(paired) < 0.75 * np.mean(apart)


def test_recovery_needs_the_same_seeds_and_something_to_recover() -> None:
    one, two = accuracy(_marks(0.5)), accuracy(_marks(0.5, 0.5))
    with pytest.raises(ValueError, match="1 and 2 and 2 seeds: expected the same seeds"):
        recovery(one, two, two)
    with pytest.raises(ValueError, match="must exceed the lower bound"):
        recovery(one, one, one)


@given(st.lists(st.lists(st.text("01", min_size=1, max_size=5), min_size=2, max_size=2), min_size=1, max_size=3))
def test_an_accuracy_is_the_mean_over_seeds_and_tasks(rights: list[list[str]]) -> None:
    # A digest stands for its examples: equal digests need equally many marks.
    found = accuracy([[(f"{task}/{len(right)}", right) for task, right in enumerate(seed)] for seed in rights])
    plain = [right.count("1") / len(right) for seed in rights for right in seed]
    assert found.value == pytest.approx(sum(plain) / len(plain))
    edges = (-1e-9, *found.interval, 1 + 1e-9)
    assert all(low <= high for low, high in pairwise(edges))
