"""Probabilities of labels from those of single tokens, and how well they are calibrated."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.answer.labels import LabelTree
from mtlora.evaluation.calibration import (
    at_temperature,
    error_by_chance,
    expected_calibration_error,
    fitted_temperatures,
)
from mtlora.suite.base import Example

_END = 0


def _tree(labels: list[str]) -> LabelTree:
    return LabelTree({label: [*map(ord, label), _END] for label in labels})


def test_labels_that_part_at_once_take_one_branch() -> None:
    tree = _tree(["(A)", "(B)", "(C)"])
    assert tree.branches == [((ord("("),), tuple(map(ord, "ABC")))]
    found = tree.probabilities([{ord("A"): -1.0, ord("B"): -1.0, ord("C"): -100.0}])
    assert found["(A)"] == pytest.approx(0.5)
    assert found["(C)"] == pytest.approx(0, abs=1e-9)


def test_a_label_that_begins_another_ends_or_goes_on() -> None:
    tree = _tree(["ret", "return", "sale"])
    assert [before for before, _ in tree.branches] == [(), tuple(map(ord, "ret"))]
    found = tree.probabilities([{ord("r"): 0.0, ord("s"): 0.0}, {_END: 0.0, ord("u"): 0.0}])
    assert found == pytest.approx({"ret": 0.25, "return": 0.25, "sale": 0.5})


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=12, unique=True), st.integers(0, 99))
def test_probabilities_add_up_to_one(labels: list[str], seed: int) -> None:
    tree, rng = _tree(labels), random.Random(seed)
    logs = [{token: -9 * rng.random() for token in after} for _, after in tree.branches]
    for temperature in (0.3, 1.0, 4.0):
        found = tree.probabilities(logs, temperature)
        assert sorted(found) == sorted(labels)
        assert sum(found.values()) == pytest.approx(1)
    assert at_temperature(tree.probabilities(logs), 4.0) == pytest.approx(tree.probabilities(logs, 4.0))


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    assert expected_calibration_error([(1.0, True)] * 4) == 0
    assert expected_calibration_error([(0.9, True), (0.9, False)]) == pytest.approx(0.4)
    # Gaps of different bins do not cancel.
    assert expected_calibration_error([(0.9, False), (0.5, True)]) == pytest.approx(0.7)


@pytest.mark.parametrize("count", [40, 400])
def test_perfect_probabilities_show_an_error_by_chance(count: int) -> None:
    rng = random.Random(count)
    confidences = [rng.uniform(0.3, 1) for _ in range(count)]
    shown = [expected_calibration_error([(each, rng.random() < each) for each in confidences]) for _ in range(400)]
    assert error_by_chance(confidences) == pytest.approx(sum(shown) / len(shown), rel=0.05)
    assert error_by_chance([1.0] * count) == 0


def test_a_few_right_answers_do_not_make_probabilities_sure() -> None:
    right = [Example("t", str(i), "yes") for i in range(4)]
    (temperature,) = fitted_temperatures(right, [{"yes": 0.9, "no": 0.1}] * 4).values()
    assert 0.5 < temperature < 1
    assert fitted_temperatures([], []) == {}


def test_a_fitted_temperature_undoes_overconfidence() -> None:
    rng, examples, found = random.Random(0), [], []
    for i in range(400):
        target = "yes" if rng.random() < 0.7 else "no"
        examples.append(Example("t", str(i), target))
        found.append({"yes": 0.99, "no": 0.01})
    (temperature,) = fitted_temperatures(examples, found).values()
    share = sum(example.target == "yes" for example in examples) / 400
    assert at_temperature(found[0], temperature)["yes"] == pytest.approx(share, abs=0.03)
