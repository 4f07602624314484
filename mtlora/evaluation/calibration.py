"""How far probabilities can be trusted: their expected error, and the temperature that makes it small."""

import math
from collections.abc import Callable, Mapping, Sequence

from mtlora.answer.labels import tempered
from mtlora.suite.base import Example
from mtlora.task import is_correct

# Gives the probability of every label of each example, in order.
Labeller = Callable[[Sequence[Example]], list[Mapping[str, float]]]

BINS = 15
# Temperatures that are tried, each a few percent above the last.
_STEPS = [0.05 * 400 ** (i / 200) for i in range(201)]
# Examples of even odds that every fit starts from: few examples move a temperature little.
_PRIOR = 2.0
_LEAST = 1e-30


def expected_calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """The mean distance of confidence and accuracy in 15 bins of equal width, weighed by the examples in each.

    outcomes: the probability of the likeliest label of each example, and whether it was right.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in outcomes:
        bins.setdefault(min(BINS - 1, int(confidence * BINS)), []).append((confidence, right))
    gaps = (abs(sum(p for p, _ in each) - sum(right for _, right in each)) for each in bins.values())
    return sum(gaps) / len(outcomes)


def calibration_error(
    examples: Sequence[Example], found: Sequence[Mapping[str, float]], temperatures: Mapping[str, float]
) -> float:
    """The expected calibration error of labels' probabilities, each at its task's temperature (1 by default)."""
    outcomes = []
    for example, probabilities in zip(examples, found, strict=True):
        at = at_temperature(probabilities, temperatures.get(example.task_id, 1.0))
        label = max(at, key=at.__getitem__)
        outcomes.append((at[label], is_correct(label, example.target)))
    return expected_calibration_error(outcomes)


def at_temperature(probabilities: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Probabilities at another temperature than 1."""
    logs = [math.log(max(each, _LEAST)) for each in probabilities.values()]
    return dict(zip(probabilities, tempered(logs, temperature), strict=True))


def fitted_temperatures(examples: Sequence[Example], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The temperature of every task at which its examples' targets are likeliest."""
    by_task: dict[str, list[tuple[Mapping[str, float], str]]] = {}
    for example, probabilities in zip(examples, found, strict=True):
        by_task.setdefault(example.task_id, []).append((probabilities, example.target))
    return {task: round(_fitted(pairs), 3) for task, pairs in by_task.items()}


def _fitted(examples: Sequence[tuple[Mapping[str, float], str]]) -> float:

    def loss(temperature: float) -> float:
        total = _PRIOR * math.log(temperature) ** 2
        for probabilities, target in examples:
            if target in probabilities:
                total -= math.log(max(at_temperature(probabilities, temperature)[target], _LEAST))
        return total

    return min(_STEPS, key=loss)
