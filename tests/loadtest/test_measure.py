"""Computations on requests: histograms, records, the knee, fairness, the server's figures, the check."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb

from loadtest import result, server_metrics
from loadtest.departure import nats_apart, nats_between, whole
from loadtest.histogram import Latency
from loadtest.knee import KneeSearch, Step
from loadtest.recorder import OTHER, Answer
from loadtest.result import jain
from loadtest.settings import Objective, RampSettings
from mtlora.client.metrics_page import MetricsPage
from tests.loadtest.samples import OBJECTIVE, outcome, record, recorder, request


@given(st.lists(st.floats(1e-4, 3000), min_size=1, max_size=60), st.floats(0.01, 1))
def test_quantiles_are_precise_to_two_digits(seconds: list[float], q: float) -> None:
    latency = Latency()
    for each in seconds:
        latency.record(each)
    exact = sorted(seconds)[max(0, math.ceil(q * len(seconds) - 1e-9) - 1)]
    assert exact * 0.985 <= latency.quantile(q) <= exact * 1.015 + 1e-5


@pytest.mark.slow
@given(st.lists(st.lists(st.floats(1e-4, 100), max_size=30), min_size=1, max_size=4))
def test_merging_histograms_loses_nothing(parts: list[list[float]]) -> None:
    merged, whole = Latency(), Latency()
    for part in parts:
        latency = Latency()
        for seconds in part:
            latency.record(seconds)
            whole.record(seconds)
        # Merge the form that a result keeps.
        merged.merge(Latency.decode(latency.to_json()["hdr"]))
    assert merged.points() == whole.points()
    assert merged.count == sum(map(len, parts))


def test_values_beyond_the_range_count_at_its_end() -> None:
    latency = Latency()
    latency.record(-1.0)
    latency.record(1e9)
    assert latency.count == 2
    assert latency.quantile(1.0) == pytest.approx(3600, rel=0.01)


def test_window_counts_requests_due_and_answers_ended_in_it() -> None:
    seen = record(
        recorder(),
        outcome(0.5, 0.8),  # warm-up, though it ended within
        outcome(1.0, 0.2),
        outcome(5.0, 0.9),
        outcome(9.0, 1.5),  # too late to be good
        outcome(10.9, 0.4),  # ends after the window
        outcome(11.0, 0.1),  # due after it
    )
    assert (seen.everything.offered, seen.total.offered, seen.total.ok, seen.total.good) == (6, 4, 4, 3)
    assert seen.total.completion_tokens == 12
    assert (seen.ended, seen.ended_tokens) == (4, 12)
    assert seen.total.itl.count == 8
    assert seen.in_flight == 0


def test_latency_counts_from_the_time_due() -> None:
    late = outcome(2.0, 0.9, sent=2.8)
    seen = record(recorder(), late)
    assert seen.total.e2e.quantile(0.5) == pytest.approx(0.9, rel=0.02)
    assert seen.lag.quantile(0.5) == pytest.approx(0.8, rel=0.02)


def test_failures_and_flaws_are_not_answers() -> None:
    seen = record(
        recorder(),
        outcome(2.0, 0.1),
        outcome(2.0, 0.1, status="UNAVAILABLE", message="draining"),
        outcome(2.0, 0.1, status="RESOURCE_EXHAUSTED", message="full"),
        outcome(2.0, 0.1, status="CUT_OFF"),
        outcome(2.0, 0.1, flaw="the reply is for task 'x'"),
    )
    assert (seen.total.offered, seen.total.ok) == (5, 1)
    assert seen.total.e2e.count == 1
    assert seen.errors["UNAVAILABLE"] == "draining"
    assert seen.flaws == ["sort: the reply is for task 'x'"]
    assert result.flawed(seen.everything) == 1
    assert result.failed(seen.everything, tolerated=False) == 3
    assert result.failed(seen.everything, tolerated=True) == 2


def test_keeps_inexact_answers_for_the_check() -> None:
    asked = request(target="three  words here")
    seen = record(
        recorder(),
        outcome(2, 0.1, request=asked, text=" three words here "),
        outcome(2, 0.1, request=asked, text="two"),
        outcome(2, 0.1, request=asked, text="two"),
        outcome(2, 0.1, request=request(), text="x"),
    )
    assert (seen.total.exact, seen.total.scored) == (1, 3)
    assert sorted(seen.answers.items(), key=str) == sorted(
        [(Answer(b"message", "sort", asked.target, "two"), 2), (Answer(b"message", "sort", None, "x"), 1)], key=str
    )


def test_other_names_share_one_group() -> None:
    asked = [request(), request("rare"), request("rarer")]
    seen = record(recorder(), *(outcome(2, 0.1, request=each) for each in asked))
    assert {name: group.offered for name, group in seen.tasks.items()} == {"sort": 1, "count": 0, OTHER: 2}


def test_window_can_be_cut_short() -> None:
    seen = record(recorder(), outcome(1.5, 0.1), outcome(3.4, 0.1))
    seen.end_window(3.6)
    assert (seen.window, seen.ended) == ((1.0, 3.6), 2)


class System:
    """A queue that answers up to `capacity` requests a second, without a server."""

    def __init__(self, capacity: float, latency: float = 0.2) -> None:
        self.capacity, self.latency = capacity, latency

    def step(self, rate: float) -> Step:
        over = max(0.0, rate / self.capacity - 1)
        e2e = self.latency / max(0.02, 1 - rate / self.capacity) if not over else 10 * (1 + over)
        good = rate if e2e <= OBJECTIVE.e2e_s else min(rate, self.capacity) * 0.3
        return Step(rate, rate, min(rate, self.capacity), good, e2e / 4, e2e)


def search(system: System, **ramp: float) -> KneeSearch:
    found = KneeSearch(RampSettings(**ramp), OBJECTIVE)  # type: ignore[arg-type]
    while (rate := found.next_rate()) is not None:
        found.add(system.step(rate))
        assert len(found.steps) < 60
    return found


@given(st.floats(0.3, 5000), st.floats(0.02, 0.5))
def test_finds_the_knee_to_the_resolution(capacity: float, resolution: float) -> None:
    found = search(System(capacity), resolution=resolution)
    # Latency is 0.2 s divided by the free share of the capacity: at 80 % load, the 1 s of the service level.
    exact = 0.8 * capacity
    assert found.knee is not None
    assert found.bounded
    assert exact / (1 + resolution) * 0.999 <= found.knee.rate <= exact * 1.001
    # Doubling and halving need no more steps.
    assert len(found.steps) <= 2 + abs(math.log2(exact / 4)) + math.log2(1 / math.log2(1 + resolution)) + 2


def test_finds_no_knee_if_no_load_holds() -> None:
    found = search(System(100, latency=5.0))
    assert found.knee is None
    assert min(step.rate for step in found.steps) == pytest.approx(4 / 32)


def test_knee_is_unbounded_if_every_load_holds() -> None:
    found = search(System(1e9), max_rate=100)
    assert found.knee is not None
    assert (found.knee.rate, found.bounded) == (100, False)


def test_names_what_breaks_the_service_level() -> None:
    step = Step(rate=10, offered=10, throughput=8, goodput=8.9, ttft=0.6, e2e=1.5)
    goodput, ttft, e2e = step.breaches(OBJECTIVE)
    assert goodput == "goodput is 89% of the offered load, below 90%"
    assert ttft == "TTFT p95 0.60 s, above 0.5 s"
    assert e2e == "E2E p95 1.50 s, above 1 s"
    assert replace(step, goodput=9.0, ttft=0.5, e2e=1.0).breaches(OBJECTIVE) == []
    assert Step(1, 0, 0, 0, 0, 0).breaches(Objective()) == []


def test_jains_index() -> None:
    assert jain([0.5, 0.5, 0.5]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == jain([0, 0]) == 1


PAGE = """# HELP mtlora_request_seconds From receipt to the end of the answer.
# TYPE mtlora_request_seconds histogram
mtlora_request_seconds_bucket{{le="0.1",task="a}} b"}} {0}
mtlora_request_seconds_bucket{{le="0.5",task="a}} b"}} {1} # {{trace_id="x"}} 0.2 1.5
mtlora_request_seconds_bucket{{le="+Inf",task="a}} b"}} {2}
mtlora_request_seconds_bucket{{le="0.1",task="c"}} 0
mtlora_request_seconds_bucket{{le="0.5",task="c"}} 0
mtlora_request_seconds_bucket{{le="+Inf",task="c"}} 0
mtlora_request_seconds_sum{{task="c"}} 1.5
mtlora_requests_total{{method="Generate",task="a",status="OK"}} {2}
mtlora_requests_total{{method="Generate",task="c",status="OK"}} 1
mtlora_requests_created{{method="Generate"}} 1.7e9
mtlora_build_info{{version="1.2",backbone="default"}} 1.0
mtlora_kv_cache 0.5
process_cpu_seconds_total 12
"""


def page(*counts: int) -> MetricsPage:
    return MetricsPage(PAGE.format(*counts))


def test_series_of_metrics_are_summed_over_labels() -> None:
    pages = [(10.0, page(1, 3, 4)), (12.0, page(1, 3, 8))]
    assert server_metrics.series(pages, 9.0) == {
        "seconds": [1.0, 3.0],
        "values": {"mtlora_requests_per_second": [None, 2.0], "mtlora_kv_cache": [0.5, 0.5]},
    }
    assert page(1, 3, 4).labels(server_metrics.BUILD) == {"version": "1.2", "backbone": "default"}
    assert server_metrics.bucket_counts(page(0, 0, 0), page(1, 3, 4), "mtlora_request_seconds") == [
        (0.1, 1), (0.5, 3), (math.inf, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "apart"), [(0.05, 1), (0.3, 0), (0.9, 1)])
def test_compares_generator_and_server_by_bucket(seconds: float, apart: int) -> None:
    before, after = page(5, 5, 5), page(5, 25, 25)
    latency = Latency()
    latency.record(seconds)
    found = server_metrics.compare(before, after, {"ttft": latency, "itl": latency, "e2e": latency})
    assert list(found) == ["e2e"]
    row = found["e2e"]["quantiles"]["p50"]
    assert (row["server_from"], row["server_to"], row["buckets_apart"]) == (0.1, 0.5, apart)
    assert found["e2e"]["observed"] == {"generator": 1, "server": 20}


def test_two_buckets_apart_disagree() -> None:
    before, after = page(0, 0, 0), page(10, 10, 10)
    latency = Latency()
    latency.record(2.0)
    found = server_metrics.compare(before, after, {"ttft": Latency(), "itl": Latency(), "e2e": latency})
    assert not found["e2e"]["agree"]


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        pytest.param((198, 199, 200), {"p99_from": 0.0, "p99_to": 0.1}, id="two of two hundred may be late"),
        pytest.param((197, 199, 200), {"p99_from": 0.1, "p99_to": 0.5}, id="three may not"),
        pytest.param((10, 10, 20), {"p99_from": 0.5, "p99_to": None}, id="beyond the last bound"),
        pytest.param((0, 0, 0), None, id="nothing counted"),
    ],
)
def test_finds_the_bucket_of_the_event_loops_delay(
    counts: tuple[int, ...], found: dict[str, float | None] | None
) -> None:
    text = PAGE.replace("mtlora_request_seconds", "mtlora_event_loop_delay_seconds")
    before, after = MetricsPage(text.format(0, 0, 0)), MetricsPage(text.format(*counts))
    assert server_metrics.loop_delay(before, after) == found


def tokens(*positions: list[tuple[str, float]]) -> list[pb.TokenLogprobs]:
    """The alternatives at each position; the chosen token comes first."""
    return [
        pb.TokenLogprobs(
            chosen=pb.TokenLogprob(token_id=0, token=top[0][0], logprob=top[0][1]),
            top=[pb.TokenLogprob(token_id=i, token=text, logprob=p) for i, (text, p) in enumerate(top)],
        )
        for top in positions
    ]


ALONE = tokens(
    [(" one", -0.1), (" two", -2.5)],
    [(" blue", -0.6), (" red", -0.8), ("<|im_end|>", -0.7)],
    [("\n", -0.1), (" x", -0.3)],
)


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("one red", 0.2),  # the other of two close tokens
        ("one red herring", 0.2),  # what follows is free to differ
        ("one", 0.1),  # an end as close as going on
        ("one blue x y", 0.2),  # going on as close as an end
        ("two blue", 2.4),  # far less likely
        ("one green", None),  # not among the likely ones
        ("three", None),
        ("", None),
    ],
)
def test_finds_the_token_where_answers_differ(text: str, gap: float | None) -> None:
    found = nats_apart(text, ALONE, ["\n"])
    assert found == (None if gap is None else pytest.approx(gap, abs=1e-5))


def test_a_blank_is_a_token_of_its_own() -> None:
    """Digits are single tokens, so a number begins with a blank."""
    alone = tokens(
        [(" ", 0.0), (" 9", -8.0)],
        [("1", 0.0), ("7", -9.0)],
        [("pm", -0.1), (" pm", -5.6)],
        [(" =>", -0.8), (" ", -0.9)],
    )
    assert nats_apart("1pm 4pm => 7pm", alone, ["\n"]) == pytest.approx(0.1, abs=1e-5)
    # Another number departs at its digit, not at a blank that both texts have.
    assert nats_apart("7pm => 7pm", alone, ["\n"]) == pytest.approx(9.0, abs=1e-5)
    # A token with a blank is not the one without.
    assert nats_apart("1pm, then", alone, ["\n"]) is None
    # Both texts go on with this word; a blank, almost as likely there, is no reason for what differs later.
    words = tokens([(" one", -0.1)], [(" two", -0.1), (" ", -0.2)], [(" three", -0.1), (" four", -6.0)])
    assert nats_apart("one two four", words, ["\n"]) == pytest.approx(5.9, abs=1e-5)


def test_compares_reasoning_too() -> None:
    task = pb.Task(id="sum", fields=["input"], stop=["\n"], answer_marker="=>")
    alone = tokens([(" 3", -0.6), (" 4", -0.7)], [(" =>", 0.0)], [(" 3", -0.1), (" 4", -4.0)], [("\n", 0.0)])
    assert whole(" 3 ", " 3", task) == "3 => 3"
    assert whole("", " 3 ", task) == "3"
    # The reasoning departs between close tokens; the answer follows from it, although its own tokens are far apart.
    assert nats_apart(whole(" 4 ", " 4", task), alone, task.stop) == pytest.approx(0.1, abs=1e-5)
    assert nats_apart(whole(" 3 ", " 4", task), alone, task.stop) == pytest.approx(3.9, abs=1e-5)


@pytest.mark.parametrize(
    ("again", "nats"),
    [
        ([[("red", -0.1), ("blue", -0.6)], [("x", -0.1)]], 0.5),
        ([[("blue", -0.1), ("red", -0.6)], [("x", -0.1)]], -0.5),
        ([[("red", -0.1)]], math.inf),
        ([[("blue", -0.1)]], -math.inf),
        ([[("green", -0.1), ("red", -0.2), ("blue", -0.3)]], None),
    ],
)
def test_a_third_answer_measures_the_same_choice(again: list[list[tuple[str, float]]], nats: float | None) -> None:
    logprobs = tokens(*again)
    text = "".join(position.chosen.token for position in logprobs)
    found = nats_between("blue x", "red x", text, logprobs, ["\n"])
    assert found == (None if nats is None else pytest.approx(nats, abs=1e-5))
