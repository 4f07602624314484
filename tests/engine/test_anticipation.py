"""When a step is held up for the request that follows an answer, and what is done meanwhile."""

import queue
import threading
import time
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, FinishReason

from mtlora.vllm_plugin.anticipation import HORIZON_S, Anticipation
from mtlora.vllm_plugin.engine_core import Between


def learned(
    step_s: float, delay_s: float, share: float = 1.0, *, now: float = 0.0, steps: int = 200
) -> tuple[Anticipation, float]:
    """After steps from `now` on that each ended an answer, which a share of requests followed; and the time then."""
    anticipation, random = Anticipation(), Random(0)
    for _ in range(steps):
        now += step_s
        anticipation.stepped(now, step_s, 1)
        if random.random() < share:
            anticipation.arrived(now + delay_s)
    now += step_s
    anticipation.stepped(now, step_s, 1)
    return anticipation, now


def test_few_sequences_wait_for_the_one_that_follows() -> None:
    anticipation, now = learned(0.09, 0.006)
    patience = anticipation.patience_s(now, running=3)
    assert 0.006 < patience <= 0.09 / 4
    # It counts from the answer.
    assert anticipation.patience_s(now + 0.002, running=3) == pytest.approx(patience - 0.002)
    anticipation.arrived(now + 0.003)
    assert anticipation.expected(now + 0.003) == 0
    assert anticipation.patience_s(now + 0.003, running=3) == 0


@pytest.mark.parametrize(
    ("step_s", "delay_s", "share", "running"),
    [
        pytest.param(0.054, 0.006, 1.0, 19, id="many would wait"),
        pytest.param(0.010, 0.006, 1.0, 3, id="steps are short"),
        pytest.param(0.090, 0.006, 0.05, 3, id="hardly any request follows"),
        pytest.param(0.090, 2 * HORIZON_S, 1.0, 3, id="clients take their time"),
    ],
)
def test_where_it_does_not_pay_no_step_waits(step_s: float, delay_s: float, share: float, running: int) -> None:
    anticipation, now = learned(step_s, delay_s, share)
    assert anticipation.patience_s(now, running) == 0


def test_what_was_learned_is_forgotten() -> None:
    anticipation, now = learned(0.09, 0.006)
    waits = 0
    for _ in range(100):
        now += 0.09
        anticipation.stepped(now, 0.09, 1)
        waits += anticipation.patience_s(now, running=3) > 0
    assert waits < 20
    assert anticipation.follows < 0.01


@given(
    st.lists(
        st.tuples(
            st.floats(0.001, 1.0), st.integers(0, 4), st.lists(st.floats(0.0, 0.1), max_size=6), st.integers(1, 64)
        ),
        max_size=60,
    )
)
def test_patience_has_bounds_whatever_comes(steps: list[tuple[float, int, list[float], int]]) -> None:
    anticipation, now, ended = Anticipation(), 0.0, -1.0
    for step_s, finished, delays, running in steps:
        now += step_s
        ended = now if finished else ended
        anticipation.stepped(now, step_s, finished)
        patience = anticipation.patience_s(now, running)
        assert 0 <= patience <= min(HORIZON_S, max(s for s, *_ in steps) / 4)
        assert patience == 0 or now - ended <= HORIZON_S + 1e-9
        assert 0 <= anticipation.follows <= 1
        for delay in sorted(delays):
            anticipation.arrived(now + delay)


class Core:
    """Of an engine core what is asked between two steps: its queue, and what is in its scheduler."""

    def __init__(self, running: int) -> None:
        self.input_queue: queue.Queue[tuple[EngineCoreRequestType, Any]] = queue.Queue()
        self.running, self.waiting = running, 0
        self.handled: list[EngineCoreRequestType] = []
        self.scheduler = SimpleNamespace(get_request_counts=lambda: (self.running, self.waiting))
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))

    def _handle_client_request(self, kind: EngineCoreRequestType, _: Any) -> None:
        self.handled.append(kind)
        self.waiting += kind == EngineCoreRequestType.ADD


ADD, ABORT = (EngineCoreRequestType.ADD, None), (EngineCoreRequestType.ABORT, None)


def outputs(finished: int) -> dict[int, EngineCoreOutputs]:
    """Of a step that ended so many answers, and one more that goes on."""
    reasons = [FinishReason.STOP] * finished + [None]
    return {0: EngineCoreOutputs(outputs=[EngineCoreOutput("id", [1], finish_reason=reason) for reason in reasons])}


@pytest.fixture
def between() -> Between:
    """One that has learned that a request follows an answer within some milliseconds, beside steps of a second."""
    anticipation, _ = learned(1.0, 0.005, now=time.monotonic() - 202)
    return Between(anticipation)


def later(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_what_follows_an_answer_is_taken_in_before_the_next_step(between: Between) -> None:
    core = Core(running=2)
    core.input_queue.put(ABORT)
    between.stepped(time.monotonic() - 1, outputs(finished=1))

    def follow() -> None:
        between.arrived()
        core.input_queue.put(ADD)

    timer = later(0.003, follow)
    between.wait(core)  # type: ignore[arg-type]
    timer.join()
    assert core.handled == [EngineCoreRequestType.ABORT, EngineCoreRequestType.ADD]
    assert between.counts()["followed"] == 1
    assert 0.002 < between.counts()["waited_s"] <= HORIZON_S + 0.02


@pytest.mark.parametrize(
    ("running", "finished"), [pytest.param(0, 1, id="nothing runs"), pytest.param(8, 1, id="no place is empty"),
                              pytest.param(2, 0, id="no answer has ended")]
)  # fmt: skip
def test_no_wait(between: Between, running: int, finished: int) -> None:
    core = Core(running)
    core.input_queue.put(ADD)
    between.arrived()
    between.stepped(time.monotonic() - 1, outputs(finished))
    between.wait(core)  # type: ignore[arg-type]
    assert core.handled == [EngineCoreRequestType.ADD]
    assert between.counts() == {"waited_s": 0, "followed": 0}
