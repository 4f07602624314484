"""The simulation against exact results, the fit against known models, and rejected demands."""

import asyncio
import contextlib
import dataclasses
import heapq
import json
import random
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc
from pydantic import ValidationError

from deploy.capacity import CapacityError, check, service
from deploy.capacity.__main__ import main
from deploy.capacity.check import saturated, steady_rate
from deploy.capacity.placement import compare, page
from deploy.capacity.plan import Demand, Sizes, make_plan
from deploy.capacity.report import compared
from deploy.capacity.result import Answered, Level, document, read_levels
from deploy.capacity.routing import ROUTERS, AdapterAware, EndpointPicker, RoundRobin
from deploy.capacity.service import ServiceModel, fit, read_model
from deploy.capacity.simulate import Memory, Replica, Request, poisson, simulate
from tests.servicers import serving

MODEL = ServiceModel(base=0.02, per_sequence=0.001, per_prompt_token=0.0002, overhead=0.004)
LENGTHS = [(60, 12), (100, 32), (140, 24)]


def closed_loop(model: ServiceModel, in_flight: int, requests: int, seed: int = 0) -> Level:
    """The result of a load test of `model`."""
    rng = random.Random(seed)
    engine, answered, waiting, now = Replica(model, None), [], [], 0.0

    def ask(at: float) -> None:
        heapq.heappush(waiting, (at + model.overhead / 2, rng.random(), Request(at, 0, 0, *rng.choice(LENGTHS))))

    for _ in range(in_flight):
        ask(0.0)
    while len(answered) < requests:
        if engine.idle and waiting:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            engine.waiting.append(heapq.heappop(waiting)[2])
        now = engine.begin_step(now)
        for done in engine.end_step(now):
            end = now + model.overhead / 2
            first = done.first_token + model.overhead / 2 - done.arrival
            answered.append(
                Answered(
                    ttft=first, seconds=end - done.arrival, prompt_tokens=done.prompt_tokens,
                    completion_tokens=done.completion_tokens,
                )
            )  # fmt: skip
            ask(end)
    return Level(in_flight=in_flight, throughput=len(answered) / now, answered=tuple(answered))


def demand(tasks: int, adapters: int, rate: float, p95_ttft: float = 1.0) -> Demand:
    return Demand(tasks=tasks, adapters=adapters, rate=rate, p95_ttft=p95_ttft)


def write_result(path: Path, level: Level) -> Path:
    path.write_text(json.dumps(document([level])))
    return path


@pytest.fixture(scope="module")
def levels() -> list[Level]:
    return [closed_loop(MODEL, n, 40 * n) for n in (1, 4, 16, 48)]


def test_simulates_an_m_d_1_queue() -> None:
    """Poisson arrivals, one server, constant service: the mean wait is rho * s / (2 (1 - rho))."""
    model = ServiceModel(base=0.01, per_sequence=0.0, per_prompt_token=0.0, max_num_seqs=1)
    requests = poisson(70.0, 2000.0, tasks=1, adapters=1, lengths=[(1, 1)])
    outcome = simulate(requests, 1, model, RoundRobin(1), warm_up=10.0)
    assert outcome.e2e.mean() == pytest.approx(0.01 + 0.7 * 0.01 / (2 * 0.3), rel=0.03)
    assert outcome.throughput == pytest.approx(70.0, rel=0.02)


def test_simulates_the_steps_of_a_request_alone() -> None:
    outcome = simulate([Request(0.0, 0, 0, 50, 10)], 1, MODEL, RoundRobin(1))
    assert outcome.ttft[0] == pytest.approx(MODEL.step(1, 50, 1) + MODEL.overhead)
    assert outcome.e2e[0] == pytest.approx(MODEL.step(1, 50, 1) + 9 * MODEL.step(1, 0, 1) + MODEL.overhead)


def test_full_replica_reaches_its_saturated_rate() -> None:
    requests = [Request(0.0, 0, 0, 100, 32) for _ in range(64 * 40)]
    outcome = simulate(requests, 1, MODEL, RoundRobin(1))
    assert len(requests) / outcome.e2e.max() == pytest.approx(MODEL.saturated_rate(100, 32), rel=0.05)


@given(st.integers(1, 5), st.sampled_from(list(ROUTERS)), st.integers(0, 1000))
@settings(max_examples=20)
def test_answers_every_request_after_its_arrival(replicas: int, router: str, seed: int) -> None:
    requests = poisson(30.0, 3.0, tasks=20, adapters=5, lengths=LENGTHS, seed=seed)
    outcome = simulate(requests, replicas, MODEL, ROUTERS[router](replicas), memory=Memory(2, 0.01))
    assert len(outcome.e2e) == len(requests)
    assert all(r.arrival < r.first_token <= r.finished for r in requests)
    assert outcome.loads >= len({r.adapter for r in requests})


def test_adapter_aware_routing_loads_fewer_adapters() -> None:
    outcomes = {}
    for name, router in ROUTERS.items():
        requests = poisson(150.0, 20.0, tasks=1000, adapters=200, lengths=LENGTHS)
        outcomes[name] = simulate(requests, 8, MODEL, router(8), memory=Memory(50, 0.05), warm_up=5.0)
    assert outcomes["adapter-aware"].loads < 0.5 * outcomes["round-robin"].loads


@given(st.lists(st.integers(0, 30), min_size=2, max_size=20), st.integers(0, 500))
def test_routing_keeps_every_replica_within_its_bound(in_flight: list[int], adapter: int) -> None:
    chosen = AdapterAware(len(in_flight), slack=1.25).choose(adapter, in_flight)
    bound = 1.25 * (sum(in_flight) + 1) / len(in_flight)
    assert in_flight[chosen] + 1 <= max(1.0, bound) or in_flight[chosen] == min(in_flight)


def test_placement_holds_adapters_where_round_robin_loads_them_everywhere() -> None:
    model = read_model(Path(service.__file__).with_name("model.json"))
    (row,) = compare(model, [8], [1_000], seconds=6.0)
    assert row.placed.hit_rate > row.round_robin.hit_rate + 0.1
    assert row.picked.hit_rate > row.round_robin.hit_rate + 0.1
    hits = " | ".join(f"{each.hit_rate:.3f}" for each in (row.round_robin, row.placed, row.picked))
    assert f"| 8 | 1,000 | {row.rate:.0f} | {hits} |" in page(iter([row]), "a command")


def test_simulated_placement_deals_out_adapters_as_the_client_does() -> None:
    router = AdapterAware(8, adapters=1_000, slack=2.0, floor=8)
    firsts = Counter(router.choose(adapter, [0] * 8) for adapter in range(1_000))
    assert max(firsts.values()) <= 1.05 * 1_000 / 8 + 1


@dataclasses.dataclass
class Seen:
    """A replica's metrics."""

    resident: set[int]
    queued: int = 0
    fill: float = 0.0
    max_resident: int = 2


def test_endpoint_picker_weighs_adapters_queues_and_caches() -> None:
    def picked(adapter: int, *replicas: Seen) -> int:
        router = EndpointPicker()
        router.observe(0.0, replicas)
        return router.choose(adapter, [0] * len(replicas))

    assert picked(1, Seen({2, 3}), Seen({1, 2}, queued=1)) == 1
    # A replica with room for the adapter and no queue, against one with a queue.
    assert picked(1, Seen({2}), Seen({1}, queued=1)) == 0
    assert picked(1, Seen({2, 3}), Seen({2})) == 1
    assert picked(1, Seen({1}, fill=0.9), Seen({1}, fill=0.1)) == 1


def test_endpoint_picker_sees_metrics_of_fifty_milliseconds_ago() -> None:
    router = EndpointPicker()
    replicas = [Seen({1}), Seen({2})]
    router.observe(0.0, replicas)
    replicas.reverse()
    router.observe(0.04, replicas)
    assert router.choose(1, [0, 0]) == 0
    router.observe(0.06, replicas)
    assert router.choose(1, [0, 0]) == 1


def test_adding_a_replica_moves_few_adapters() -> None:
    before, after = AdapterAware(20), AdapterAware(21)
    moved = sum(before.choose(a, [0] * 20) != after.choose(a, [0] * 21) for a in range(1000))
    assert moved < 150


def test_fit_recovers_the_model(levels: list[Level]) -> None:
    found = fit(levels)
    for in_flight, each in zip((1, 4, 16, 48), levels, strict=True):
        again = closed_loop(found, in_flight, 40 * in_flight)
        assert again.throughput == pytest.approx(each.throughput, rel=0.05)
        p95 = [np.percentile([a.seconds for a in level.answered], 95) for level in (each, again)]
        assert p95[1] == pytest.approx(p95[0], rel=0.08)


def test_simulates_ten_thousand_tasks_on_a_hundred_replicas_in_a_minute() -> None:
    requests = poisson(1000.0, 20.0, tasks=10_000, adapters=2000, lengths=LENGTHS)
    began = time.process_time()
    outcome = simulate(requests, 100, MODEL, AdapterAware(100), memory=Memory(200, 0.05))
    assert time.process_time() - began < 60
    assert len(outcome.e2e) == len(requests)


def test_plans_the_fewest_replicas_that_suffice() -> None:
    plan = make_plan(demand(tasks=100, adapters=10, rate=40.0, p95_ttft=0.5), MODEL, LENGTHS)
    assert plan.outcome.percentiles(plan.outcome.ttft)[1] <= 0.5
    requests = poisson(40.0, 60.0, tasks=100, adapters=10, lengths=LENGTHS)
    fewer = plan.replicas - 1
    if fewer:
        memory = Memory(plan.footprint.resident, 0.05)
        outcome = simulate(requests, fewer, MODEL, AdapterAware(fewer), memory=memory, warm_up=15.0)
        assert outcome.percentiles(outcome.ttft)[1] > 0.5
    assert plan.footprint.resident == 10
    assert plan.footprint.slots == MODEL.max_num_seqs


def test_memory_limits_resident_adapters() -> None:
    sizes = Sizes(adapter=100 << 20)
    plan = make_plan(demand(500, 500, 5.0), MODEL, LENGTHS, memory_gib=2.0, sizes=sizes)
    assert 0 < plan.footprint.resident < 20
    assert plan.footprint.total <= 2.0 * 0.9


IMPOSSIBLE = {
    "rate": (demand(10, 1, 1e6), 8.0, "rate: found 1e[+]06 requests/s; 100 replicas"),
    "latency": (demand(10, 1, 1.0, p95_ttft=0.001), 8.0, "p95_ttft: found 0.001 s; a request alone"),
    "memory": (demand(10, 1, 1.0), 0.2, "memory: a replica has 0.2 GiB to use.*no room for one adapter"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_rejects_demands_that_no_plan_can_meet(name: str) -> None:
    asked, memory_gib, message = IMPOSSIBLE[name]
    with pytest.raises(CapacityError, match=message):
        make_plan(asked, MODEL, LENGTHS, memory_gib=memory_gib)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 1.0), "tasks\n.*greater than or equal to 1"),
        ((5, 6, 1.0), "adapters: found 6 for 5 tasks"),
        ((5, 1, 0.0), "rate\n.*greater than 0"),
        ((5, 1, float("nan")), "rate\n.*finite number"),
        ((10**6, 1, 1.0), "tasks\n.*less than or equal to 100000"),
    ],
)
def test_rejects_invalid_demands(values: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        demand(*values)


def test_runs_the_commands(levels: list[Level], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [str(write_result(tmp_path / f"{level.in_flight}.json", level)) for level in levels]
    assert main(["fit", *results, "--out", str(tmp_path / "model.json")]) == 0
    flags = ["--tasks", "50", "--adapters", "2", "--rate", "30"]
    assert main(["plan", "--results", *results, *flags]) == 0
    by_fit = capsys.readouterr().out
    assert "replicas " in by_fit
    assert main(["plan", "--results", *results, *flags, "--model", str(tmp_path / "model.json")]) == 0
    assert capsys.readouterr().out in by_fit
    assert main(["plan", "--results", *results, "--tasks", "50", "--adapters", "2", "--rate", "1e9"]) == 1
    assert "capacity: rate: found 1e+09 requests/s" in capsys.readouterr().err
    assert main(["plan", "--results", *results, *flags, "--memory-gib", "0.1"]) == 1
    assert "no room for one adapter" in capsys.readouterr().err
    assert main(["plan", "--results", *results, "--tasks", "0", "--adapters", "2", "--rate", "30"]) == 1
    assert "tasks: Input should be greater than or equal to 1" in capsys.readouterr().err
    assert main(["fit", results[0], "--out", str(tmp_path / "x")]) == 1
    assert "one concurrency" in capsys.readouterr().err


def test_reads_the_levels_it_wrote(levels: list[Level], tmp_path: Path) -> None:
    assert read_levels([write_result(tmp_path / "a", levels[0]), write_result(tmp_path / "b", levels[1])]) == levels[:2]


def test_rejects_answers_without_a_first_token_time(levels: list[Level], tmp_path: Path) -> None:
    path = write_result(tmp_path / "unary.json", levels[0])
    path.write_text(path.read_text().replace('"time_to_first_token_s": 0', '"time_to_first_token_s": null, "x": 0'))
    with pytest.raises(CapacityError, match="time_to_first_token_s: Input should be a valid number"):
        read_levels([path])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "phases": []}', '{"format": 1, "phases": [{}]}']
)
def test_rejects_files_that_are_no_result(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(CapacityError, match=r"r\.json: "):
        read_levels([path])


def test_document_compares_simulation_and_measurement() -> None:
    found = " ".join(compared({"rate": 24.81, "saturated": (47.96, 49.57), "p95_s": (1.069, 1.038)}))
    assert "answered 48.0 requests/s, by the model 49.6" in found
    assert "24.8 requests/s was then sent round robin: p95 end to end was 1.07 s, in the simulation 1.04 s" in found


def test_full_servers_answer_what_the_model_says() -> None:
    full = closed_loop(MODEL, 96, 2000)
    measured, modelled = saturated(MODEL, [full, full])
    assert measured == 2 * full.throughput
    assert modelled == pytest.approx(measured, rel=0.05)
    # A model that is too fast or too slow is seen.
    for factor in (0.5, 1.9):
        wrong = dataclasses.replace(MODEL, base=factor * MODEL.base, per_sequence=factor * MODEL.per_sequence)
        assert abs(saturated(wrong, [full])[1] / full.throughput - 1) > 0.2


class PacedServer(inference_pb2_grpc.InferenceServicer):
    """Takes a millisecond a token."""

    def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        return pb.ListTasksResponse(tasks=[pb.Task(id="navigate", fields=["input"])])

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        tokens = request.parameters.max_new_tokens
        time.sleep(0.001 * tokens)
        summary = pb.Summary(task_id="navigate", prompt_tokens=40, completion_tokens=tokens)
        summary.timings.time_to_first_token.FromTimedelta(timedelta(seconds=0.001))
        summary.timings.total.FromTimedelta(timedelta(seconds=0.001 * tokens))
        return pb.GenerateResponse(text="x", summary=summary)


@pytest.mark.slow
def test_check_measures_full_servers_and_the_open_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_LEVELS", (1, 8))
    monkeypatch.setattr(check, "_FULL_TIMES", 3)
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(2):
            paced = serving(PacedServer(), inference_pb2_grpc.add_InferenceServicer_to_server, threads=64)
            addresses.append(stack.enter_context(paced)[0])
        found = asyncio.run(check._check(addresses, seconds=1.0, utilisation=0.05, seed=0))
    assert [level.in_flight for level in found.levels] == [1, 1, 8, 8]
    # 64 requests of 24 tokens on average, and the machine may be slower.
    assert 0 < found.saturated[0] <= 2 * 64 / 0.024 * 1.2
    assert found.saturated[1] > 0
    assert found.p95[0] > 0.008


def test_rate_of_a_loop_leaves_out_its_filling_and_emptying() -> None:
    # Two in flight: one answer per second, except for a slow start and a slow end.
    assert steady_rate([5.0, 9.0, 10.0, 11.0, 12.0, 20.0], in_flight=2) == pytest.approx(1)
