"""The metrics page: bounded however many tasks and tenants there are, and right whatever the engine's processes do."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from server.call import Call
from server.engine import BetweenSteps, EngineStats, RoutingSums, WorkerStats
from server.telemetry.metrics import TOP_TASKS, TOP_TENANTS, UNKNOWN_TASK, Metrics
from server.telemetry.top import OTHER, TopLabels
from server.tenants import Tenant

STATUSES = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


def call(task: str = "one", tenant: str = "open", **fields: object) -> Call:
    return Call("r", "Generate", task, tenant=Tenant(id=tenant), **fields)  # type: ignore[arg-type]


def worker(**fields: object) -> WorkerStats:
    empty = {
        "slots": 64, "slots_in_use": 0, "slots_registered": 0, "resident_bytes": 0, "weight_loads": 0,
        "slot_evictions": 0, "routing": {},
    }  # fmt: skip
    return WorkerStats(**(empty | fields))  # type: ignore[arg-type]


LOOP = range(1_000_000)


def least_time(work: Callable[[], object]) -> float:
    """Seconds of this thread's own time, of five times: neighbours on the machine do not count."""
    times = []
    for _ in range(5):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_scrape_of_many_tasks_and_tenants_is_small_and_quick() -> None:
    metrics = Metrics()
    for i in range(20_000):
        each = call(f"a-task-with-a-name-of-some-length-{i % 5000}", f"tenant-{i % 200}", prompt_tokens=50)
        each.method = ("Generate", "GenerateStream")[i % 2]
        metrics.record_request(each, STATUSES[i % 7 % 6])
        metrics.observe_ttft(each, 0.2)
        metrics.observe_e2e(each, 1.0)
        metrics.set_tenant_in_flight(each.tenant.id, i % 5)
        metrics.set_tenant_queued(each.tenant.id, i % 3)
        metrics.record_service(each.tenant.id, 100.0)
        metrics.record_quota_refusal(each.tenant.id, "max_queue")
        metrics.record_shed(each.tenant.id, "deadline")
    routing = {f"adapter-{i}/1": RoutingSums(8, 4.0, [1.0] * 16) for i in range(1000)}
    metrics.record_workers([worker(routing=routing)])
    page = generate_latest(metrics.registry)
    assert len(page) <= 1_000_000
    # 50 ms where a million rounds of a loop take 40: a fixed time would say more of the machine than of the page.
    assert least_time(lambda: generate_latest(metrics.registry)) <= 1.25 * least_time(lambda: sum(i for i in LOOP))
    labels = {s.labels["task"] for m in metrics.registry.collect() for s in m.samples if "task" in s.labels}
    assert len(labels) == TOP_TASKS + 1
    labels = {s.labels["tenant"] for m in metrics.registry.collect() for s in m.samples if "tenant" in s.labels}
    assert len(labels) == TOP_TENANTS + 1


def test_requests_are_counted_once_whichever_label_they_get() -> None:
    metrics = Metrics(top_tasks=3)
    for i in range(100):
        metrics.record_request(call(f"task-{i % 10}"), "OK")
    samples = [s for m in metrics.registry.collect() for s in m.samples if s.name == "mtlora_requests_total"]
    assert sum(s.value for s in samples) == 100
    assert value(metrics, "mtlora_requests_total", method="Generate", task=OTHER, status="OK") == 70


def test_no_task_and_unknown_tasks_have_labels_of_their_own() -> None:
    metrics = Metrics(top_tasks=1)
    for task in ("busy", "", UNKNOWN_TASK):
        metrics.record_request(call(task), "OK")
        assert value(metrics, "mtlora_requests_total", method="Generate", task=task, status="OK") == 1


def test_an_id_that_becomes_busy_takes_the_place_of_an_idle_one() -> None:
    dropped: list[str] = []
    top = TopLabels(2, dropped.append, rank_every=50)
    assert [top.count("a"), top.count("b"), top.count("c")] == ["a", "b", OTHER]
    for _ in range(100):
        top.count("a")
        top.count("c")
    assert dropped == ["b"]
    assert [top.label("a"), top.label("b"), top.label("c")] == ["a", OTHER, "c"]


def test_a_dropped_task_leaves_no_series() -> None:
    metrics = Metrics(top_tasks=1)
    metrics.record_request(call("first", prompt_tokens=5), "OK")
    metrics._drop_task("first")
    assert b'task="first"' not in generate_latest(metrics.registry)


@given(st.lists(st.sampled_from("abcdefghij"), max_size=400), st.integers(1, 4))
def test_never_more_labels_than_the_limit(names: list[str], limit: int) -> None:
    kept: set[str] = set()
    top = TopLabels(limit, kept.discard, rank_every=7)
    for name in names:
        if (label := top.count(name)) != OTHER:
            kept.add(label)
        assert len(kept) <= limit
        assert all(top.label(each) == each for each in kept)


def test_tenants_are_folded_when_scraped() -> None:
    metrics = Metrics(top_tenants=1)
    metrics.record_request(call(tenant="big"), "OK")
    for tenant, requests in (("big", 5), ("small", 2), ("smaller", 1)):
        metrics.set_tenant_in_flight(tenant, requests)
    assert value(metrics, "mtlora_tenant_requests_in_flight", tenant="big") == 5
    assert value(metrics, "mtlora_tenant_requests_in_flight", tenant=OTHER) == 3
    assert value(metrics, "mtlora_requests_queued") == 0
    for tenant in ("big", "small"):
        metrics.set_tenant_queued(tenant, 3)
    assert value(metrics, "mtlora_requests_queued") == 6
    metrics.set_tenant_in_flight("small", 0)
    assert value(metrics, "mtlora_tenant_requests_in_flight", tenant=OTHER) == 1


def test_several_engines_add_up() -> None:
    metrics = Metrics()
    for engine, running, usage in ((0, 3, 0.1), (1, 4, 0.7), (0, 5, 0.2)):
        metrics.record_engine(EngineStats(running, 1, usage, 10, 5, preemptions=1, tasks=2, adapters=1, engine=engine))
    assert value(metrics, "mtlora_engine_running_sequences") == 9
    assert value(metrics, "mtlora_engine_waiting_sequences") == 2
    assert value(metrics, "mtlora_engine_kv_cache_usage_ratio") == 0.7
    assert value(metrics, "mtlora_engine_preemptions_total") == 3
    assert value(metrics, "mtlora_engine_step_sequences_count") == 3


def test_a_steps_sequences_include_those_it_ended() -> None:
    metrics = Metrics()
    metrics.record_engine(EngineStats(0, 0, 0.0, 0, 0, finished=5))
    metrics.record_engine(EngineStats(3, 0, 0.0, 0, 0, finished=2))
    assert value(metrics, "mtlora_engine_step_sequences_count") == 2
    assert value(metrics, "mtlora_engine_step_sequences_sum") == 10
    assert value(metrics, "mtlora_engine_step_tasks_count") == 1


def test_counts_between_steps_add_up_over_engines_and_restarts() -> None:
    metrics = Metrics()
    metrics.record_between_steps([BetweenSteps(0.5, 3), BetweenSteps(0.25, 1)])
    metrics.record_between_steps([BetweenSteps(0.5, 3), BetweenSteps(0.75, 2)])
    metrics.record_engine_restart("died")
    metrics.record_between_steps([BetweenSteps(0.125, 1)])
    assert value(metrics, "mtlora_engine_anticipation_seconds_total") == 1.375
    assert value(metrics, "mtlora_engine_anticipated_requests_total") == 6


def test_counts_of_workers_survive_their_restart() -> None:
    metrics = Metrics()
    metrics.record_workers([worker(weight_loads=3, resident_bytes=10), worker(weight_loads=3, resident_bytes=20)])
    metrics.record_workers([worker(weight_loads=4), worker(weight_loads=4)])
    assert value(metrics, "mtlora_adapter_weight_loads_total") == 8
    metrics.record_engine_restart("died")
    metrics.record_workers([worker(weight_loads=2)])
    assert value(metrics, "mtlora_adapter_weight_loads_total") == 10
    assert value(metrics, "mtlora_adapter_slots") == 64
    assert value(metrics, "mtlora_engine_restarts_total", reason="died") == 1


def test_routing_is_that_of_the_busiest_adapters() -> None:
    metrics = Metrics()
    routing = {f"a/{i}": RoutingSums(rows=i + 1, entropy=0.5, expert_weights=[0.25, 0.75]) for i in range(30)}
    metrics.record_workers([worker(), worker(routing=routing), worker(routing=routing)])
    assert value(metrics, "mtlora_routing_sampled_rows_total", adapter="a/29") == 30
    assert value(metrics, "mtlora_routing_expert_weight_total", adapter="a/29", expert="1") == 0.75
    assert value(metrics, "mtlora_routing_sampled_rows_total", adapter=OTHER) == sum(range(1, 11))


@pytest.mark.parametrize("exemplars", [True, False])
def test_exemplars_by_flag(exemplars: bool) -> None:
    metrics = Metrics(exemplars=exemplars)
    metrics.observe_e2e(call(), 0.1)
    assert (b'# {request_id="r"} 0.1' in openmetrics(metrics.registry)) is exemplars


@given(st.lists(st.tuples(st.sampled_from([0.001, 0.0025, 0.003, 0.04, 0.9, 2.5, 7.0]), st.integers(1, 5))))
def test_gaps_are_counted_as_prometheus_counts_them(gaps: list[tuple[float, int]]) -> None:
    metrics, registry = Metrics(), CollectorRegistry()
    name = "mtlora_inter_token_latency_seconds"
    found = next(family for family in metrics.registry.collect() if family.name == name)
    bounds = [sample.labels["le"] for sample in found.samples if sample.name.endswith("_bucket")]
    expected = Histogram(name, found.documentation, buckets=[float(bound) for bound in bounds], registry=registry)
    for gap, times in gaps:
        metrics.itl.observe(gap, times)
        for _ in range(times):
            expected.observe(gap)
    page, wanted = generate_latest(metrics.registry).decode(), generate_latest(registry).decode()
    ours = [line for line in page.splitlines() if name in line]
    theirs = [line for line in wanted.splitlines() if name in line]
    assert [line for line in ours if "_sum" not in line] == [line for line in theirs if "_sum" not in line]
    total = registry.get_sample_value(f"{name}_sum")
    assert value(metrics, f"{name}_sum") == pytest.approx(total)
