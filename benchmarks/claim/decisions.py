"""The decisions of the claim, as defined in docs/claim.md, each with its numbers, interval and verdict."""

from collections.abc import Mapping
from typing import Any

from benchmarks.claim.cells import Cells, Key
from mtlora.suite.vision.maps import PREFIX, LabelMapSuite
from mtlora.sweep.statistics import Estimate

# The thresholds of docs/claim.md.
KEPT, LOST, FALL = 0.5, 0.25, -0.15
MARGIN = 0.03
TOLD_MARGIN = 0.1
MAPS_FALL = -0.05

UNDECIDED = "undecided"
COLLAPSING, PLAIN, BLOCK, ROUTING, WHOLE, TOLD = (
    "LoRA q,v", "LoRA all, equal parameters", "block", "block + routing", "block + both", "block + both + task bias",
)  # fmt: skip
FEW, _, MANY = DECIDING = 5, 15, 25
MAPS = (4, 16, 64)
MAP_METHODS = (COLLAPSING, PLAIN, BLOCK, WHOLE, TOLD)
Decision = dict[str, Any]


def decide(cells: Cells) -> list[Decision]:
    """Every decision, over the seeds that its cells have.

    `value` and `interval` of its `statistic` are None where cells are missing; `numbers`: its parts, as values or as
    (value, low, high).
    """
    found = []
    # The shared head space decides; heads that are told the task are reported beside it.
    for part in ("shared", "told"):
        found.append(_collapse(cells, part))
        found.append(_difference(cells, part, WHOLE, PLAIN))
        found.append(_difference(cells, part, ROUTING, BLOCK))
    found += [_told_apart(cells, number) for number in MAPS]
    return found + [_maps_kept(cells, method) for method in MAP_METHODS]


def collapse(few: Estimate, some: Estimate, fall: Estimate) -> str:
    """The outcome of recoveries at few and at some tasks, and of the difference from few to many."""
    if few.value >= KEPT and some.interval[1] < LOST:
        return "collapse"
    if few.value >= KEPT and fall.interval[0] > FALL:
        return "no collapse"
    return "degradation" if fall.interval[1] < 0 else UNDECIDED


def helps(difference: Estimate) -> str:
    """The outcome of a difference of accuracies."""
    low, high = difference.interval
    if low > 0 and difference.value >= MARGIN:
        return "helps"
    if low >= -MARGIN and high <= MARGIN:
        return "null result"
    return "hurts" if high < 0 and difference.value <= -MARGIN else UNDECIDED


def told_apart(accuracy: Estimate, ceiling: float) -> str:
    """The outcome of comparing an accuracy with that of answers that do not depend on the map."""
    low, high = accuracy.interval
    bar = ceiling + TOLD_MARGIN
    return "told apart" if low > bar else "not told apart" if high < bar else UNDECIDED


def maps_kept(fall: Estimate) -> str:
    """The outcome of the accuracy with most maps minus that with fewest."""
    low, high = fall.interval
    return "kept" if low > MAPS_FALL else "lost" if high < MAPS_FALL else UNDECIDED


def map_ceiling(number: int) -> float:
    """The highest accuracy of answers that do not depend on the map."""
    return LabelMapSuite(f"{PREFIX}{number}").ceiling


def _collapse(cells: Cells, part: str) -> Decision:
    keys = [(part, COLLAPSING, number) for number in DECIDING]
    seeds = _common(cells, keys, bounded=True)
    found = [cells.recovery(key, seeds) if seeds else None for key in keys]
    few, some, many = found
    fall = many - few if few and many else None
    verdict = collapse(few, some, fall) if few and some and fall else UNDECIDED
    numbers = {f"R at {number}": each for number, each in zip(DECIDING, found, strict=True)}
    question = f"{part}: does {COLLAPSING} collapse?"
    return _decision(question, f"R at {MANY} - R at {FEW}", seeds, fall, verdict, numbers)


def _difference(cells: Cells, part: str, method: str, other: str) -> Decision:
    keys = [(part, method, MANY), (part, other, MANY)]
    seeds = _common(cells, keys)
    found = {key[1]: cells.accuracy(key, seeds) if seeds else None for key in keys}
    ahead, behind = found.values()
    difference = ahead - behind if ahead and behind else None
    verdict = helps(difference) if difference else UNDECIDED
    question = f"{part}: does {method} help over {other}?"
    return _decision(question, f"difference of accuracies at {MANY} tasks", seeds, difference, verdict, found)


def _told_apart(cells: Cells, number: int) -> Decision:
    key, ceiling = (f"maps-{number}-words", TOLD, number), map_ceiling(number)
    seeds = cells.seeds(key)
    accuracy = cells.accuracy(key, seeds) if seeds else None
    verdict = told_apart(accuracy, ceiling) if accuracy else UNDECIDED
    question = f"{number} maps, one classifier: does {TOLD} tell them apart?"
    return _decision(question, "accuracy", seeds, accuracy, verdict, {"ceiling": ceiling})


def _maps_kept(cells: Cells, method: str) -> Decision:
    keys = [(f"maps-{number}-own", method, number) for number in (min(MAPS), max(MAPS))]
    seeds = _common(cells, keys)
    found = {f"accuracy with {key[2]}": cells.accuracy(key, seeds) if seeds else None for key in keys}
    few, many = found.values()
    fall = many - few if few and many else None
    verdict = maps_kept(fall) if fall else UNDECIDED
    question = f"maps with own heads: does {method} keep its accuracy?"
    return _decision(question, f"accuracy with {max(MAPS)} maps - with {min(MAPS)}", seeds, fall, verdict, found)


def _common(cells: Cells, keys: list[Key], *, bounded: bool = False) -> list[int]:
    """The seeds that all of these have."""
    return sorted(set.intersection(*(set(cells.seeds(key, bounded=bounded)) for key in keys)))


def _decision(
    question: str,
    statistic: str,
    seeds: list[int],
    value: Estimate | None,
    verdict: str,
    numbers: Mapping[str, Estimate | float | None],
) -> Decision:
    return {
        "question": question,
        "statistic": statistic,
        "seeds": seeds,
        "value": value and value.value,
        "interval": value and value.interval,
        "numbers": {name: (n.value, *n.interval) if isinstance(n, Estimate) else n for name, n in numbers.items()},
        "verdict": verdict,
    }
