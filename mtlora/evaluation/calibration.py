"""Calibration of probabilities: their expected error, and temperatures that reduce it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtlora.answer.labels import tempered
from mtlora.evaluation.answerers import Labeller
from mtlora.suite.base import Example
from mtlora.task import TaskSpec, is_correct

BINS = 15
# Temperatures that are tried, each a few percent above the last.
_STEPS = [0.05 * 400 ** (i / 200) for i in range(201)]
# Penalty, in nats, of a temperature e times the common one. Cross-validation on the shipped adapter prefers
# this to no prior and to one temperature for all; half or twice as much changes little, as does a bias a label.
# A common one e times 1 has the same penalty, which matters only with few examples.
_PRIOR = 2.0
_LEAST = 1e-30


@dataclass(frozen=True)
class Calibration:
    """Calibration errors of `total` labels, and the error that perfect probabilities would show on so many.

    errors, by_chance: without temperatures ("uncalibrated"), at the checkpoint's ("stored"), and at `temperatures`
    ("fitted"), which are fitted to these examples, by task.
    """

    total: int
    temperatures: Mapping[str, float]
    errors: Mapping[str, float]
    by_chance: Mapping[str, float]


def calibrate(
    labeller: Labeller, tasks: Iterable[TaskSpec], examples: Sequence[Example], stored: Mapping[str, float]
) -> Calibration | None:
    """Measure the labels' calibration on the examples of tasks with labels; None without such examples.

    stored: the checkpoint's temperatures by task.
    """
    labelled = {task.id for task in tasks if task.labels}
    chosen = [example for example in examples if example.task_id in labelled]
    if not chosen:
        return None
    found = labeller(chosen)
    fitted = fitted_temperatures(chosen, found)
    errors, by_chance = {}, {}
    for name, temperatures in (("uncalibrated", {}), ("stored", stored), ("fitted", fitted)):
        outcomes = label_outcomes(chosen, found, temperatures)
        errors[name] = round(expected_calibration_error(outcomes), 4)
        by_chance[name] = round(error_by_chance([confidence for confidence, _ in outcomes]), 4)
    return Calibration(len(chosen), fitted, errors, by_chance)


def expected_calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """The mean distance of confidence and accuracy in 15 bins of equal width, weighed by the examples in each.

    outcomes: the probability of the likeliest label of each example, and whether it was right.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in outcomes:
        bins.setdefault(min(BINS - 1, int(confidence * BINS)), []).append((confidence, right))
    gaps = (abs(sum(p for p, _ in each) - sum(right for _, right in each)) for each in bins.values())
    return sum(gaps) / len(outcomes)


def error_by_chance(confidences: Sequence[float]) -> float:
    """The exact mean of the expected calibration error that perfect probabilities would have on this few examples.

    confidences: the probability of the likeliest label of each example.
    """
    bins: dict[int, list[float]] = {}
    for confidence in confidences:
        bins.setdefault(min(BINS - 1, int(confidence * BINS)), []).append(confidence)
    gaps = 0.0
    for each in bins.values():
        # The probability of every number of right answers in the bin.
        chance: np.ndarray = np.ones(1)
        for confidence in each:
            chance = np.convolve(chance, (1 - confidence, confidence))
        gaps += float(chance @ np.abs(np.arange(len(chance)) - sum(each)))
    return gaps / len(confidences)


def label_outcomes(
    examples: Sequence[Example], found: Sequence[Mapping[str, float]], temperatures: Mapping[str, float]
) -> list[tuple[float, bool]]:
    """(probability of the likeliest label, whether it is right) of each example, at its task's temperature, or 1."""
    outcomes = []
    for example, probabilities in zip(examples, found, strict=True):
        at = at_temperature(probabilities, temperatures.get(example.task_id, 1.0))
        label = max(at, key=at.__getitem__)
        outcomes.append((at[label], is_correct(label, example.target)))
    return outcomes


def at_temperature(probabilities: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Probabilities at another temperature than 1."""
    logs = [math.log(max(each, _LEAST)) for each in probabilities.values()]
    return dict(zip(probabilities, tempered(logs, temperature), strict=True))


def fitted_temperatures(examples: Sequence[Example], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The temperature of every task at which its examples' targets are likeliest.

    Few examples of a task say little, so every task's fit begins from the temperature that suits all of them together,
    and that from 1: a few examples that are all right would else be likeliest at the lowest temperature.
    """
    by_task: dict[str, list[tuple[Mapping[str, float], str]]] = {}
    for example, probabilities in zip(examples, found, strict=True):
        if example.target in probabilities:
            by_task.setdefault(example.task_id, []).append((probabilities, example.target))
    losses = {task: [_loss(pairs, temperature) for temperature in _STEPS] for task, pairs in by_task.items()}
    if not losses:
        return {}

    def fitted(loss: Sequence[float], start: float) -> float:
        best = min(range(len(_STEPS)), key=lambda i: loss[i] + _PRIOR * math.log(_STEPS[i] / start) ** 2)
        return _STEPS[best]

    joint = fitted([sum(each) for each in zip(*losses.values(), strict=True)], 1.0)
    return {task: round(fitted(each, joint), 3) for task, each in losses.items()}


def _loss(pairs: Sequence[tuple[Mapping[str, float], str]], temperature: float) -> float:
    return -sum(math.log(max(at_temperature(each, temperature)[target], _LEAST)) for each, target in pairs)
