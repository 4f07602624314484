"""The metrics page: its size is bounded, and its counts survive restarts of the engine's processes."""

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from server.engine import EngineStats, RoutingSums, WorkerStats
from server.job import Lane
from server.telemetry.collectors import CounterFamily, Histograms
from server.telemetry.metrics import TOP_TASKS, TOP_TENANTS, UNKNOWN_TASK, Metrics
from server.telemetry.routers import GAUGES
from server.telemetry.top import OTHER, TopLabels

STATUSES = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


# The server has no `_created` samples to compare.
disable_created_metrics()

EXEMPLAR = {"request_id": "r"}


def record(
    metrics: Metrics,
    task: str = "one",
    tenant: str = "open",
    status: str = "OK",
    method: str = "Generate",
    tokens: int = 0,
) -> None:
    metrics.record_request(method, task, tenant, status, tokens, tokens)


def worker(**fields: object) -> WorkerStats:
    empty = {
        "slots": 64, "slots_in_use": 0, "slots_registered": 0, "resident_bytes": 0, "weight_loads": 0,
        "slot_evictions": 0, "routing": {},
    }  # fmt: skip
    return WorkerStats(**(empty | fields))  # type: ignore[arg-type]


LOOP = range(1_000_000)


def least_time(work: Callable[[], object]) -> float:
    """The least processor time of five runs, in seconds: other processes do not count."""
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
        task, tenant = f"a-task-with-a-name-of-some-length-{i % 5000}", f"tenant-{i % 200}"
        record(metrics, task, tenant, STATUSES[i % 7 % 6], ("Generate", "GenerateStream")[i % 2], tokens=50)
        metrics.observe_ttft(tenant, 0.2, EXEMPLAR)
        metrics.observe_e2e(tenant, 1.0, EXEMPLAR)
        metrics.record_service(tenant, 100.0)
        metrics.record_quota_refusal(tenant, "max_queue")
        metrics.record_shed(tenant, "deadline")
    turns = {f"tenant-{i}": i % 5 for i in range(200)}
    metrics.follow_turns(lambda: turns, lambda: turns)
    routing = {f"adapter-{i}/1": RoutingSums(8, 4.0, [1.0] * 16) for i in range(1000)}
    metrics.record_workers([worker(routing=routing)])
    page = generate_latest(metrics.registry)
    assert len(page) <= 1_000_000
    # Compared with a million rounds of a loop, because a fixed time would depend on the machine.
    assert least_time(lambda: generate_latest(metrics.registry)) <= 1.25 * least_time(lambda: sum(i for i in LOOP))
    labels = {s.labels["task"] for m in metrics.registry.collect() for s in m.samples if "task" in s.labels}
    assert len(labels) == TOP_TASKS + 1
    labels = {s.labels["tenant"] for m in metrics.registry.collect() for s in m.samples if "tenant" in s.labels}
    assert len(labels) == TOP_TENANTS + 1


def test_requests_are_counted_once_under_any_label() -> None:
    metrics = Metrics(top_tasks=3)
    for i in range(100):
        record(metrics, f"task-{i % 10}")
    samples = [s for m in metrics.registry.collect() for s in m.samples if s.name == "mtlora_requests_total"]
    assert sum(s.value for s in samples) == 100
    assert value(metrics, "mtlora_requests_total", method="Generate", task=OTHER, status="OK") == 70


def test_no_task_and_unknown_tasks_have_labels_of_their_own() -> None:
    metrics = Metrics(top_tasks=1)
    for task in ("busy", "", UNKNOWN_TASK):
        record(metrics, task)
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
    record(metrics, "first", tokens=5)
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


def test_gauges_by_tenant_are_summed_at_each_scrape() -> None:
    metrics = Metrics(top_tenants=1)
    record(metrics, tenant="big")
    running = {"big": 5, "small": 2, "smaller": 1}
    queued: dict[str, int] = {}
    metrics.follow_turns(lambda: running, lambda: queued)
    assert value(metrics, "mtlora_tenant_requests_in_flight", tenant="big") == 5
    assert value(metrics, "mtlora_tenant_requests_in_flight", tenant=OTHER) == 3
    assert value(metrics, "mtlora_requests_queued") == 0
    queued |= {"big": 3, "small": 3}
    assert value(metrics, "mtlora_requests_queued") == 6
    del running["small"]
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


def test_sequences_of_a_step_include_those_that_ended_in_it() -> None:
    metrics = Metrics()
    metrics.record_engine(EngineStats(0, 0, 0.0, 0, 0, finished=5))
    metrics.record_engine(EngineStats(3, 0, 0.0, 0, 0, finished=2))
    assert value(metrics, "mtlora_engine_step_sequences_count") == 2
    assert value(metrics, "mtlora_engine_step_sequences_sum") == 10
    assert value(metrics, "mtlora_engine_step_tasks_count") == 1


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


def test_routing_shows_the_busiest_adapters() -> None:
    metrics = Metrics()
    routing = {f"a/{i}": RoutingSums(rows=i + 1, entropy=0.5, expert_weights=[0.25, 0.75]) for i in range(30)}
    metrics.record_workers([worker(), worker(routing=routing)])
    assert value(metrics, "mtlora_routing_sampled_rows_total", adapter="a/29") == 30
    assert value(metrics, "mtlora_routing_expert_weight_total", adapter="a/29", expert="1") == 0.75
    assert value(metrics, "mtlora_routing_sampled_rows_total", adapter=OTHER) == sum(range(1, 11))


def test_routing_of_several_engines_adds_up() -> None:
    metrics = Metrics()
    one = worker(routing={"a/1": RoutingSums(8, 4.0, [6.0, 2.0]), "b/1": RoutingSums(8, 1.0, [8.0])})
    other = worker(routing={"a/1": RoutingSums(24, 6.0, [1.0, 3.0, 20.0])})
    metrics.record_workers([one, worker()])
    metrics.record_workers([other], Lane.IMAGES)
    metrics.record_workers([one, worker(), other])
    rows = "mtlora_routing_sampled_rows_total"
    assert (value(metrics, rows, adapter="a/1"), value(metrics, rows, adapter="b/1")) == (8 + 2 * 24, 8)
    assert value(metrics, "mtlora_routing_entropy_ratio_total", adapter="a/1") == 4 + 2 * 6
    weights = [value(metrics, "mtlora_routing_expert_weight_total", adapter="a/1", expert=str(n)) for n in range(3)]
    assert weights == [6 + 2, 2 + 6, 40]


@pytest.mark.parametrize("exemplars", [True, False])
def test_histograms_carry_exemplars_by_flag(exemplars: bool) -> None:
    metrics = Metrics(exemplars=exemplars)
    metrics.observe_e2e("open", 0.1, EXEMPLAR)
    assert (b'# {request_id="r"} 0.1' in openmetrics(metrics.registry)) is exemplars


OBSERVED = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.1, 0.25, 0.3, 9.0]), st.integers(1, 5)))


def page_without_sums(registry: CollectorRegistry) -> list[str]:
    """The page's lines but sums, which differ in their last bits: n equal observations are one product."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_sum" not in line]


@given(OBSERVED, st.booleans())
def test_histograms_look_like_those_of_prometheus_client(observed: list[tuple[str, float, int]], drop: bool) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histograms = Histograms("h", "text", ["label"], buckets=(0.25, 1.0), registry=ours)
    plain = Histograms("p", "text", buckets=(0.25, 1.0), registry=ours)
    expected = Histogram("h", "text", ["label"], buckets=(0.25, 1.0), registry=theirs)
    expected_plain = Histogram("p", "text", buckets=(0.25, 1.0), registry=theirs)
    for label, seconds, times in observed:
        histograms.observe(seconds, times, labels=(label,))
        plain.observe(seconds, times)
        for _ in range(times):
            expected.labels(label).observe(seconds)
            expected_plain.observe(seconds)
    if drop:
        histograms.drop("label", "a")
        expected.remove_by_labels({"label": "a"})
    assert page_without_sums(ours) == page_without_sums(theirs)
    for name, labels in (("h_sum", {"label": "b"}), ("p_sum", {})):
        assert ours.get_sample_value(name, labels) == pytest.approx(theirs.get_sample_value(name, labels))


@given(OBSERVED, st.booleans())
def test_counts_look_like_counters_of_prometheus_client(observed: list[tuple[str, float, int]], drop: bool) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts, plain = CounterFamily("c", "text", ["label", "n"], registry=ours), CounterFamily("p", "text", registry=ours)
    expected = Counter("c", "text", ["label", "n"], registry=theirs)
    expected_plain = Counter("p", "text", registry=theirs)
    for label, amount, n in observed:
        counts.inc(amount, (label, str(n)))
        plain.inc()
        expected.labels(label, n).inc(amount)
        expected_plain.inc()
    if drop:
        counts.drop("label", "a")
        expected.remove_by_labels({"label": "a"})
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_bucket_shows_its_last_exemplar() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histograms = Histograms("h", "text", buckets=(1.0, 2.0), registry=ours)
    expected = Histogram("h", "text", buckets=(1.0, 2.0), registry=theirs)
    for seconds, request_id in ((0.5, "a"), (1.5, "b"), (0.75, "c")):
        histograms.observe(seconds, exemplar={"request_id": request_id})
        expected.observe(seconds, {"request_id": request_id})
    pages = [re.sub(rb"} ([\d.]+) [\d.]+", rb"} \1 TIME", openmetrics(each)) for each in (ours, theirs)]
    assert pages[0] == pages[1]
    assert pages[0].count(b"TIME") == 2


def test_every_metric_has_a_name_a_type_and_help() -> None:
    """docs/reference is made of these."""
    metrics = Metrics()
    families = list(metrics.registry.collect())
    assert sorted(family.name for family in families) == sorted(metrics.labels)
    for family in families:
        assert family.name.startswith("mtlora_") or family.name in GAUGES
        assert family.type in ("counter", "gauge", "histogram")
        assert family.documentation.endswith(".")
