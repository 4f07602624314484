"""Prometheus metrics, in a registry of their own, on an HTTP port of their own.

One registry in one process: what the engine's processes know reaches it through the engine's own channel
(`EngineStats` every step, `WorkerStats` every few seconds), so nothing is shared in files and nothing is counted twice.
Labels `task`, `tenant` and `adapter` are bounded: the busiest have a value of their own, the rest are "other".
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from mtlora import __version__
from server.telemetry.collectors import CounterOf, GaugeByLabel, RunsHistogram
from server.telemetry.top import OTHER, TopLabels

if TYPE_CHECKING:
    from server.engine import BetweenSteps, EngineStats, WorkerStats

UNKNOWN_TASK = "unknown"
TOP_TASKS = 100
TOP_TENANTS = 50
TOP_ADAPTERS = 20

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_QUEUE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Fewer: there is one histogram a tenant.
_TENANT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DELAY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Every metric of the server, and the only place where one is named.

    exemplars: histograms of a request's times carry its trace's id, or its own where it has no trace; they show where a
    scraper asks for OpenMetrics.
    """

    def __init__(self, *, exemplars: bool = False, top_tasks: int = TOP_TASKS, top_tenants: int = TOP_TENANTS) -> None:
        # A `_created` sample a series would be a third more to scrape, and nothing here reads it.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._exemplars = exemplars
        self._top_tasks = TopLabels(top_tasks, self._drop_task)
        self._top_tenants = TopLabels(top_tenants, self._drop_tenant)
        self._requests()
        self._tenants()
        self._engine()
        self._adapters()

    def _requests(self) -> None:
        registry: Any = {"registry": self.registry}
        self.requests = Counter(
            "mtlora_requests", "Finished requests, by gRPC status.", ["method", "task", "status"], **registry
        )
        self.in_flight = Gauge("mtlora_requests_in_flight", "Admitted requests that are not finished.", **registry)
        self.prompt_tokens = Counter("mtlora_prompt_tokens", "Prompt tokens.", ["task"], **registry)
        self.completion_tokens = Counter("mtlora_completion_tokens", "Generated tokens.", ["task"], **registry)
        self.prompt_length = Histogram(
            "mtlora_request_prompt_tokens", "Prompt tokens of a request.", buckets=_TOKEN_BUCKETS, **registry
        )
        self.completion_length = Histogram(
            "mtlora_request_completion_tokens", "Generated tokens of a request.", buckets=_TOKEN_BUCKETS, **registry
        )
        self.queue = Histogram(
            "mtlora_queue_seconds", "From receipt until first scheduled.", buckets=_QUEUE_BUCKETS, **registry
        )
        self.ttft = Histogram(
            "mtlora_time_to_first_token_seconds", "From receipt to first token.", buckets=_LATENCY_BUCKETS, **registry
        )
        self.itl = RunsHistogram(
            "mtlora_inter_token_latency_seconds",
            "Between tokens of a sequence; of a unary answer, averages over a few.",
            _ITL_BUCKETS,
        )
        self.registry.register(self.itl)
        self.e2e = Histogram(
            "mtlora_request_seconds", "From receipt to the end of the answer.", buckets=_LATENCY_BUCKETS, **registry
        )

    def _tenants(self) -> None:
        registry: Any = {"registry": self.registry}
        self._tenant_requests = Counter(
            "mtlora_tenant_requests", "Finished requests of a tenant, by gRPC status.", ["tenant", "status"], **registry
        )
        self._tenant_tokens = Counter(
            "mtlora_tenant_tokens", "Tokens of a tenant: prompt or completion.", ["tenant", "kind"], **registry
        )
        self._tenant_ttft = Histogram(
            "mtlora_tenant_time_to_first_token_seconds", "From receipt to first token, by tenant.", ["tenant"],
            buckets=_TENANT_BUCKETS, **registry,
        )  # fmt: skip
        self._tenant_e2e = Histogram(
            "mtlora_tenant_request_seconds", "From receipt to the end of the answer, by tenant.", ["tenant"],
            buckets=_TENANT_BUCKETS, **registry,
        )  # fmt: skip
        self._refusals = Counter(
            "mtlora_quota_refusals", "Requests refused for a tenant's quota.", ["tenant", "quota"], **registry
        )
        self._shed = Counter(
            "mtlora_shed_requests", "Requests given up to keep the rest in time.", ["tenant", "reason"], **registry
        )
        self._tenant_service = Counter(
            "mtlora_tenant_service", "Service as the fair queue counts it, by tenant.", ["tenant"], **registry
        )
        self.tenants = Gauge("mtlora_tenants", "Tenants that the server knows.", **registry)
        self.tenants_refused = Counter(
            "mtlora_tenants_reload_failures", "Changed tenants files that were refused.", **registry
        )
        label = self._top_tenants.label
        self._tenant_in_flight = GaugeByLabel(
            "mtlora_tenant_requests_in_flight", "Requests of a tenant that the engine has.", "tenant", label
        )
        self._tenant_queued = GaugeByLabel(
            "mtlora_tenant_requests_queued", "Admitted requests of a tenant that wait for their turn.", "tenant", label
        )
        self.registry.register(self._tenant_in_flight)
        self.registry.register(self._tenant_queued)
        queued = Gauge("mtlora_requests_queued", "Admitted requests that wait for their turn.", **registry)
        queued.set_function(self._tenant_queued.total)

    def _engine(self) -> None:
        registry: Any = {"registry": self.registry}
        self.serving = Gauge("mtlora_serving", "1 while requests are served.", **registry)
        self._by_engine: dict[int, EngineStats] = {}
        self.running = Gauge("mtlora_engine_running_sequences", "Sequences that the engine runs.", **registry)
        self.waiting = Gauge("mtlora_engine_waiting_sequences", "Sequences that wait in the engine.", **registry)
        self.kv_cache = Gauge(
            "mtlora_engine_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1; of the fullest engine.",
            **registry,
        )  # fmt: skip
        self.prefix_queries = Counter(
            "mtlora_engine_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", **registry
        )
        self.prefix_hits = Counter("mtlora_engine_prefix_cache_hits", "Prompt tokens found there.", **registry)
        self.preemptions = Counter("mtlora_engine_preemptions", "Sequences put back for want of KV cache.", **registry)
        self.batch = Histogram(
            "mtlora_engine_step_sequences", "Sequences of a step.", buckets=_BATCH_BUCKETS, **registry
        )
        self.step_slots = Histogram(
            "mtlora_engine_step_tasks",
            "Distinct tasks of the sequences that run on after a step; those without a bias of their own count as one.",
            buckets=_BATCH_BUCKETS, **registry,
        )  # fmt: skip
        self.step_adapters = Histogram(
            "mtlora_engine_step_adapters", "Distinct adapter versions of the sequences that run on after a step.",
            buckets=_BATCH_BUCKETS, **registry,
        )  # fmt: skip
        self._waited = CounterOf(
            Counter("mtlora_engine_anticipation_seconds", "For which steps waited for requests to follow.", **registry)
        )
        self._followed = CounterOf(
            Counter("mtlora_engine_anticipated_requests", "Requests that followed while a step waited.", **registry)
        )
        self._restarts = Counter(
            "mtlora_engine_restarts", "Engines lost, to be started anew, while the server ran.", ["reason"], **registry
        )
        self.loop_delay = Histogram(
            "mtlora_event_loop_delay_seconds", "By which the server's event loop is late, ten times a second.",
            buckets=_DELAY_BUCKETS, **registry,
        )  # fmt: skip
        self.build = Gauge(
            "mtlora_build_info", "1; what runs here, as labels.", ["version", "python", "backbone"], **registry
        )

    def _adapters(self) -> None:
        registry: Any = {"registry": self.registry}
        self.adapters = Gauge("mtlora_adapters", "Adapter versions, by state: loaded or failed.", ["state"], **registry)
        self.tasks = Gauge("mtlora_tasks", "Tasks that can be asked.", **registry)
        self._events = Counter("mtlora_adapter_events", "Adapter versions that reached a stage.", ["stage"], **registry)
        self._failures = Counter(
            "mtlora_adapter_failures", "Adapter versions that did not reach a stage.", ["stage"], **registry
        )
        self.adapters_resident = Gauge("mtlora_adapters_resident", "Adapter versions in the engine.", **registry)
        self.adapter_evictions = Counter(
            "mtlora_adapter_evictions", "Adapter versions that made room for another in the engine.", **registry
        )
        self.adapter_swap = Histogram(
            "mtlora_adapter_swap_seconds", "From a version's discovery until it serves.", buckets=_LOAD_BUCKETS,
            **registry,
        )  # fmt: skip
        self.adapter_cold = Histogram(
            "mtlora_adapter_cold_seconds", "What requests waited whose adapter was not in the engine.",
            buckets=_LOAD_BUCKETS, **registry,
        )  # fmt: skip
        self.adapter_load = Histogram(
            "mtlora_adapter_load_seconds", "To load an adapter version with all its slots.", buckets=_LOAD_BUCKETS,
            **registry,
        )  # fmt: skip
        self._slots = Gauge("mtlora_adapter_slots", "Slots that a step can use.", **registry)
        self._slots_in_use = Gauge("mtlora_adapter_slots_in_use", "Slots that hold a task now.", **registry)
        self._registered = Gauge("mtlora_adapter_slots_registered", "Tasks that may take a slot.", **registry)
        self._resident = Gauge(
            "mtlora_adapter_resident_bytes", "Adapter weights in memory, all ranks together.", **registry
        )
        self._loads = CounterOf(
            Counter("mtlora_adapter_weight_loads", "Adapter versions read into memory, on every rank.", **registry)
        )
        self._evictions = CounterOf(
            Counter("mtlora_adapter_slot_evictions", "Tasks that made room for another in a slot.", **registry)
        )
        self._routing = _Routing()
        self.registry.register(self._routing)

    # Requests.

    def record_request(
        self, method: str, task: str, tenant: str, status: str, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """Count a finished request, by gRPC status name."""
        task = self._top_tasks.count(task) if task not in ("", UNKNOWN_TASK) else task
        tenant = self._top_tenants.count(tenant)
        self.requests.labels(method, task, status).inc()
        self._tenant_requests.labels(tenant, status).inc()
        if not prompt_tokens:
            return
        self.prompt_tokens.labels(task).inc(prompt_tokens)
        self.completion_tokens.labels(task).inc(completion_tokens)
        self.prompt_length.observe(prompt_tokens)
        self.completion_length.observe(completion_tokens)
        self._tenant_tokens.labels(tenant, "prompt").inc(prompt_tokens)
        self._tenant_tokens.labels(tenant, "completion").inc(completion_tokens)

    def observe_queue(self, seconds: float, exemplar: dict[str, str]) -> None:
        """From receipt until first scheduled."""
        self.queue.observe(seconds, self._exemplar(exemplar))

    def observe_ttft(self, tenant: str, seconds: float, exemplar: dict[str, str]) -> None:
        """From receipt to first token."""
        self.ttft.observe(seconds, self._exemplar(exemplar))
        self._tenant_ttft.labels(self._top_tenants.claim(tenant)).observe(seconds)

    def observe_e2e(self, tenant: str, seconds: float, exemplar: dict[str, str]) -> None:
        """From receipt to the last token of a complete answer."""
        self.e2e.observe(seconds, self._exemplar(exemplar))
        self._tenant_e2e.labels(self._top_tenants.claim(tenant)).observe(seconds)

    def _exemplar(self, exemplar: dict[str, str]) -> dict[str, str] | None:
        return exemplar if self._exemplars else None

    # Tenants.

    def follow_turns(self, running: Callable[[], Mapping[str, int]], queued: Callable[[], Mapping[str, int]]) -> None:
        """Read, at every scrape, each tenant's requests that the engine has and that wait for their turn."""
        self._tenant_in_flight.read = running
        self._tenant_queued.read = queued

    def record_quota_refusal(self, tenant: str, quota: str) -> None:
        """Count a request refused for a tenant's quota; `quota` is the quota's name, one of a fixed few."""
        self._refusals.labels(self._top_tenants.claim(tenant), quota).inc()

    def record_shed(self, tenant: str, reason: str) -> None:
        """Count a request given up under overload; `reason` is one of a fixed few."""
        self._shed.labels(self._top_tenants.claim(tenant), reason).inc()

    def record_service(self, tenant: str, service: float) -> None:
        """Count service of a tenant, as the fair queue counts it."""
        self._tenant_service.labels(self._top_tenants.claim(tenant)).inc(service)

    # Engine.

    def record_build(self, backbone: str) -> None:
        """What runs here."""
        self.build.labels(__version__, platform.python_version(), backbone).set(1)

    def record_engine(self, stats: "EngineStats") -> None:
        """The state of one engine after a step; with data parallelism there are several."""
        self._by_engine[stats.engine] = stats
        engines = self._by_engine.values()
        self.running.set(sum(each.running for each in engines))
        self.waiting.set(sum(each.waiting for each in engines))
        self.kv_cache.set(max(each.kv_cache_usage for each in engines))
        self.prefix_queries.inc(stats.prefix_cache_queries)
        self.prefix_hits.inc(stats.prefix_cache_hits)
        self.preemptions.inc(stats.preemptions)
        if sequences := stats.running + stats.finished:
            self.batch.observe(sequences)
        if stats.running:
            self.step_slots.observe(stats.tasks)
            self.step_adapters.observe(stats.adapters)

    def record_between_steps(self, engines: Sequence["BetweenSteps"]) -> None:
        """What every engine did between its steps."""
        self._waited.set(sum(each.waited_s for each in engines))
        self._followed.set(sum(each.followed for each in engines))

    def record_engine_restart(self, reason: str) -> None:
        """Count an engine that was lost; `reason` is one of a fixed few. The counts of the next begin at 0 again."""
        self._restarts.labels(reason).inc()
        self._by_engine.clear()
        for counter in (self._loads, self._evictions, self._waited, self._followed):
            counter.restart()
        self._routing.restart()
        for gauge in (self.running, self.waiting, self.kv_cache):
            gauge.set(0)

    # Adapters.

    def record_catalog(self, *, loaded: int, failed: int, tasks: int) -> None:
        """What can be asked."""
        self.adapters.labels("loaded").set(loaded)
        self.adapters.labels("failed").set(failed)
        self.tasks.set(tasks)

    def record_stage(self, stage: str, failed_stage: str | None) -> None:
        """Count a stage that an adapter version reached, and one that it did not."""
        self._events.labels(stage).inc()
        if failed_stage is not None:
            self._failures.labels(failed_stage).inc()

    def record_workers(self, workers: Sequence["WorkerStats"]) -> None:
        """What every rank of every engine counts of its adapters. Ranks of an engine hold the same slots."""
        if not workers:
            return
        self._slots.set(max(each.slots for each in workers))
        self._slots_in_use.set(max(each.slots_in_use for each in workers))
        self._registered.set(max(each.slots_registered for each in workers))
        self._resident.set(sum(each.resident_bytes for each in workers))
        self._loads.set(sum(each.weight_loads for each in workers))
        self._evictions.set(sum(each.slot_evictions for each in workers))
        self._routing.set(workers)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Open the HTTP port; returns it, and what closes it. Raises OSError where it cannot be opened."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port, server.shutdown

    def _drop_task(self, task: str) -> None:
        for metric in (self.requests, self.prompt_tokens, self.completion_tokens):
            metric.remove_by_labels({"task": task})

    def _drop_tenant(self, tenant: str) -> None:
        for metric in (
            self._tenant_requests, self._tenant_tokens, self._tenant_ttft, self._tenant_e2e, self._refusals, self._shed,
            self._tenant_service,
        ):  # fmt: skip
            metric.remove_by_labels({"tenant": tenant})


class _Routing(Collector):
    """What the routers chose, of the tokens that were sampled, by adapter version."""

    def __init__(self) -> None:
        self._workers: Sequence[WorkerStats] = ()

    def set(self, workers: Sequence["WorkerStats"]) -> None:
        self._workers = workers

    def restart(self) -> None:
        self._workers = ()

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(
            "mtlora_routing_sampled_rows", "Rows (token and group) whose routing was sampled.", labels=["adapter"]
        )
        entropy = CounterMetricFamily(
            "mtlora_routing_entropy_ratio",
            "Sum over sampled rows of the router's entropy, as a share of its maximum.",
            labels=["adapter"],
        )
        experts = CounterMetricFamily(
            "mtlora_routing_expert_weight", "Sum over sampled rows of an expert's weight.", labels=["adapter", "expert"]
        )
        # Ranks share x and so the routing: the first that sampled speaks for all.
        routing = next((worker.routing for worker in self._workers if worker.routing), {})
        ranked = sorted(routing.items(), key=lambda item: item[1].rows, reverse=True)
        for adapter, sums in ranked[:TOP_ADAPTERS]:
            tokens.add_metric([adapter], sums.rows)
            entropy.add_metric([adapter], sums.entropy)
            for expert, weight in enumerate(sums.expert_weights):
                experts.add_metric([adapter, str(expert)], weight)
        if rest := ranked[TOP_ADAPTERS:]:
            tokens.add_metric([OTHER], sum(sums.rows for _, sums in rest))
            entropy.add_metric([OTHER], sum(sums.entropy for _, sums in rest))
        yield from (tokens, entropy, experts)
