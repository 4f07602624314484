"""Every verdict of the claim, from intervals and from whole sets of results."""

from typing import Any

import numpy as np
import pytest

from benchmarks.claim.cells import LOWER, UPPER, Cells
from benchmarks.claim.decisions import (
    BLOCK,
    COLLAPSING,
    MAP_METHODS,
    MAPS,
    PLAIN,
    ROUTING,
    TOLD,
    WHOLE,
    collapse,
    decide,
    helps,
    maps_kept,
    told_apart,
)
from mtlora.sweep.statistics import Estimate
from tests.benchmarks.claim_results import result


def results(accuracies: dict[tuple[str, int], float], seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Results of methods by number of tasks, shared, with bounds of 0.25 and 0.75."""
    tasks = [f"t{i}" for i in range(25)]
    found = []
    for seed in seeds:
        found += [result("upper", UPPER, 0.75, (task,), seed) for task in tasks]
        for number in {number for _, number in accuracies}:
            found.append(result("shared", LOWER, 0.25, tuple(tasks[:number]), seed))
        for (name, number), accuracy in accuracies.items():
            found.append(result("shared", name, accuracy, tuple(tasks[:number]), seed))
    return found


def _estimate(low: float, high: float, value: float | None = None) -> Estimate:
    return Estimate((low + high) / 2 if value is None else value, np.repeat([low, high], 100), 3)


@pytest.mark.parametrize(
    ("few", "some", "fall", "verdict"),
    [
        ((0.8, 1.0), (0.0, 0.2), (-1.0, -0.7), "collapse"),
        ((0.8, 1.0), (0.0, 0.3), (-1.0, -0.7), "degradation"),
        ((0.8, 1.0), (0.7, 0.9), (-0.14, 0.1), "no collapse"),
        ((0.8, 1.0), (0.7, 0.9), (-0.16, 0.1), "undecided"),
        # If there is nothing to lose at few tasks, neither outcome is shown.
        ((0.1, 0.3), (0.0, 0.1), (-0.1, 0.1), "undecided"),
        ((0.3, 0.5), (0.0, 0.1), (-0.4, -0.2), "degradation"),
    ],
)
def test_collapse_is_decided_by_the_three_intervals(few: Any, some: Any, fall: Any, verdict: str) -> None:
    assert collapse(_estimate(*few), _estimate(*some), _estimate(*fall)) == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.06), "helps"),
        ((0.01, 0.04), "undecided"),
        ((0.01, 0.02), "null result"),
        ((-0.03, 0.03), "null result"),
        ((-0.02, 0.06), "undecided"),
        ((-0.06, -0.01), "hurts"),
        ((-0.02, -0.01), "null result"),
    ],
)
def test_help_is_decided_by_its_interval(interval: tuple[float, float], verdict: str) -> None:
    assert helps(_estimate(*interval)) == verdict


def test_maps_are_told_apart_and_kept_by_their_intervals() -> None:
    for interval, verdict in (((0.3, 0.4), "told apart"), ((0.2, 0.26), "not told apart"), ((0.2, 0.3), "undecided")):
        assert told_apart(_estimate(*interval), 0.166) == verdict
    for interval, verdict in (((-0.04, 0.0), "kept"), ((-0.1, -0.06), "lost"), ((-0.1, 0.0), "undecided")):
        assert maps_kept(_estimate(*interval)) == verdict


def test_without_results_all_is_undecided() -> None:
    decisions = decide(Cells([]))
    assert len(decisions) == 2 * 3 + len(MAPS) + len(MAP_METHODS)
    assert {(each["verdict"], each["value"]) for each in decisions} == {("undecided", None)}


def test_decisions_hold_their_numbers() -> None:
    found = results({
        (COLLAPSING, 5): 0.7, (COLLAPSING, 15): 0.3, (COLLAPSING, 25): 0.25,
        (PLAIN, 25): 0.5, (WHOLE, 25): 0.75, (BLOCK, 25): 0.5, (ROUTING, 25): 0.5,
    })  # fmt: skip
    collapsed, whole, routing = decide(Cells(found))[:3]
    assert collapsed["verdict"] == "collapse"
    assert collapsed["value"] == pytest.approx(0.0 - 0.9)
    assert collapsed["interval"][0] < -0.9 < collapsed["interval"][1]
    assert collapsed["numbers"]["R at 5"][0] == pytest.approx(0.9)
    assert collapsed["numbers"]["R at 15"][0] == pytest.approx(0.1)
    assert collapsed["seeds"] == [0, 1, 2]
    assert (whole["verdict"], whole["value"]) == ("helps", pytest.approx(0.25))
    assert whole["numbers"][PLAIN][0] == pytest.approx(0.5)
    # The same answers to the same images differ in no draw.
    assert (routing["verdict"], routing["value"], routing["interval"]) == ("null result", 0.0, (0.0, 0.0))
    # The other seeds still decide; without any seed, there is no decision.
    some = [r for r in found if (r["name"], r["seed"]) != (WHOLE, 1)]
    assert decide(Cells(some))[1]["seeds"] == [0, 2]
    bound = [r for r in found if r["name"] != UPPER or "t20" not in r["tasks"]]
    assert [each["verdict"] for each in decide(Cells(bound))[:2]] == ["undecided", "helps"]


def test_maps_are_compared_over_the_same_pictures() -> None:
    found = []
    for number in MAPS:
        tasks = tuple(f"map-{i:03}" for i in range(number))
        found.append(result(f"maps-{number}-words", TOLD, 0.75, tasks, 0))
        found += [result(f"maps-{number}-own", name, 0.8 if number < 64 else 0.775, tasks, 0) for name in MAP_METHODS]
    decisions = decide(Cells(found))[6:]
    assert [each["verdict"] for each in decisions[:3]] == ["told apart"] * 3
    assert [each["numbers"]["ceiling"] for each in decisions[:3]] == pytest.approx([0.35, 0.25625, 0.165625])
    # One picture in 40: in draws it counts 0 to 3 times.
    assert [each["value"] for each in decisions[3:]] == pytest.approx([-0.025] * len(MAP_METHODS))
    assert decisions[3]["interval"] == pytest.approx((-0.075, 0.0))
    assert decisions[3]["verdict"] == "undecided"
