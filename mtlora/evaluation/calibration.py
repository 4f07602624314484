"""How far probabilities can be trusted: their expected error, and the temperature that makes it small."""

import math
from collections.abc import Mapping, Sequence

from mtlora.answer.labels import tempered

BINS = 15
# Temperatures that are tried, each a few percent above the last.
_STEPS = [0.05 * 400 ** (i / 200) for i in range(201)]
# Examples of even odds that every fit starts from: few examples move a temperature little.
_PRIOR = 2.0


def expected_calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """The mean distance of confidence and accuracy in 15 bins of equal width, weighed by the examples in each.

    outcomes: the probability of the likeliest label of each example, and whether it was right.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in outcomes:
        bins.setdefault(min(BINS - 1, int(confidence * BINS)), []).append((confidence, right))
    gaps = (abs(sum(p for p, _ in each) - sum(right for _, right in each)) for each in bins.values())
    return sum(gaps) / len(outcomes)


def fitted_temperature(examples: Sequence[tuple[Mapping[str, float], str]]) -> float:
    """The temperature at which the targets are likeliest.

    examples: the log-probability of every label of each example, and its target, which may be none of them.
    """

    def loss(temperature: float) -> float:
        total = _PRIOR * math.log(temperature) ** 2
        for logs, target in examples:
            if target in logs:
                found = dict(zip(logs, tempered(list(logs.values()), temperature), strict=True))
                total -= math.log(max(found[target], 1e-30))
        return total

    return min(_STEPS, key=loss)
