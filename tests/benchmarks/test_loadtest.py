"""`make loadtest`: the size of its rounds, its last line, its flags."""

import pytest

from benchmarks.server.loadtest import Loop, Plan, last_line, requests_of_round


@pytest.mark.parametrize(
    ("in_flight", "knee", "requests"),
    [(37, 38.7, 320), (96, 38.7, 384), (4, 2.7, 54), (96, 2.7, 192), (200, 38.7, 774), (2, 0.05, 4)],
)
def test_rounds_are_short_on_a_slow_machine(in_flight: int, knee: float, requests: int) -> None:
    assert requests_of_round(Loop("closed", in_flight, unary=True), knee) == requests


def test_last_line_keeps_its_form() -> None:
    phases = [{"tasks": {"sort": {}, "count": {}}}, {"tasks": {"sort": {}}}]
    made = {
        "phases": phases,
        "knee": {"offered_per_second": 8.94},
        "failed": 1,
        "wrong": 2,
        "in_process": {"ratio": 0.956},
    }
    assert last_line(made) == "loadtest: 2 tasks, knee 8.9 req/s, failed 1, wrong 2, end-to-end/in-process 0.96"


def test_plan_comes_from_flags_not_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMEOUT", "1")
    plan = Plan(_cli_parse_args=["--slo-ttft", "2", "--step", "3", "--tasks", "sort, count"])
    assert (plan.ttft_s, plan.step_s, plan.tasks, plan.timeout_s, plan.rounds) == (2, 3, ("sort", "count"), 60, 5)
