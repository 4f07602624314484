"""The server's Prometheus metrics, by name, and the HTTP port that shows them.

They live in one registry in the server's process. Engines send their counts over their own channel (`EngineStats` every
step, `WorkerStats` every few seconds), so no files are shared and nothing is counted twice. The labels `task`, `tenant`
and `adapter` are bounded: the busiest have a value of their own, the rest are "other".
"""

import platform
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Gauge

from mtlora import __version__
from server.job import Lane
from server.telemetry.collectors import CounterFamily, CounterOf, GaugeByLabel, Histograms
from server.telemetry.engine_stats import EngineStats, KvCache, WorkerStats, total_routing
from server.telemetry.port import serve_metrics
from server.telemetry.routers import GAUGES, AdapterMemory, EngineLoad, RouterMetrics
from server.telemetry.top import OTHER, TopLabels

UNKNOWN_TASK = "unknown"
TOP_TASKS = 100
TOP_TENANTS = 50
TOP_ADAPTERS = 20

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_QUEUE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Fewer buckets, because every tenant has its own histogram.
_TENANT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DELAY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Every metric of the server. All methods run on the event loop.

    exemplars: histograms of a request's times carry the ids that callers give as exemplars; scrapers get them in
    OpenMetrics.
    """

    def __init__(self, *, exemplars: bool = False, top_tasks: int = TOP_TASKS, top_tenants: int = TOP_TENANTS) -> None:
        self.registry = CollectorRegistry()
        # Label names by metric name, without the `_total` of counters. Kept here because the registry's families do not
        # store them.
        self.labels: dict[str, tuple[str, ...]] = {}
        self._exemplars = exemplars
        self._top_tasks = TopLabels(top_tasks, self._drop_task)
        self._top_tenants = TopLabels(top_tenants, self._drop_tenant)
        self._define_requests()
        self._define_tenants()
        self._define_engine()
        self._define_adapters()
        self._define_routers()

    def _define_requests(self) -> None:
        self._requests = self._counts(
            "mtlora_requests", "Finished requests, by gRPC status.", "method", "task", "status"
        )
        self.in_flight = self._gauge("mtlora_requests_in_flight", "Admitted requests that are not finished.")
        self._prompt_tokens = self._counts("mtlora_prompt_tokens", "Prompt tokens.", "task")
        self._completion_tokens = self._counts("mtlora_completion_tokens", "Generated tokens.", "task")
        self._prompt_length = self._histograms(
            "mtlora_request_prompt_tokens", "Prompt tokens of a request.", buckets=_TOKEN_BUCKETS
        )
        self._completion_length = self._histograms(
            "mtlora_request_completion_tokens", "Generated tokens of a request.", buckets=_TOKEN_BUCKETS
        )
        self._queue = self._histograms(
            "mtlora_queue_seconds", "From receipt until the engine first schedules the request.", buckets=_QUEUE_BUCKETS
        )
        self._ttft = self._histograms(
            "mtlora_time_to_first_token_seconds", "From receipt to first token.", buckets=_LATENCY_BUCKETS
        )
        self.itl = self._histograms(
            "mtlora_inter_token_latency_seconds",
            "Time between tokens of a sequence; for unary answers, averaged over a few tokens.",
            buckets=_ITL_BUCKETS,
        )
        self.image_decode = self._histograms(
            "mtlora_image_decode_seconds",
            "From an image's entry into the line of those to decode until it is ready for the engine.",
            buckets=_QUEUE_BUCKETS,
        )
        self._e2e = self._histograms(
            "mtlora_request_seconds", "From receipt to the end of the answer.", buckets=_LATENCY_BUCKETS
        )

    def _define_tenants(self) -> None:
        self._tenant_requests = self._counts(
            "mtlora_tenant_requests", "Finished requests of a tenant, by gRPC status.", "tenant", "status"
        )
        self._tenant_tokens = self._counts(
            "mtlora_tenant_tokens", "Tokens of a tenant: prompt or completion.", "tenant", "kind"
        )
        self._tenant_ttft = self._histograms(
            "mtlora_tenant_time_to_first_token_seconds",
            "From receipt to first token, by tenant.",
            "tenant",
            buckets=_TENANT_BUCKETS,
        )
        self._tenant_e2e = self._histograms(
            "mtlora_tenant_request_seconds",
            "From receipt to the end of the answer, by tenant.",
            "tenant",
            buckets=_TENANT_BUCKETS,
        )
        self._refusals = self._counts(
            "mtlora_quota_refusals", "Requests refused for a tenant's quota.", "tenant", "quota"
        )
        self._shed = self._counts("mtlora_shed_requests", "Requests given up under overload.", "tenant", "reason")
        self._tenant_service = self._counts(
            "mtlora_tenant_service", "Service as the fair queue counts it, by tenant.", "tenant"
        )
        self.tenants = self._gauge("mtlora_tenants", "Tenants that the server knows.")
        self.tenants_refused = self._counts(
            "mtlora_tenants_reload_failures", "Reloads of the tenants file that failed."
        )
        self._accounting_failures = self._counts(
            "mtlora_accounting_failures", "Writes of the audit log or of usage that failed.", "log"
        )
        # Create both series now: `increase` is 0 for a series that begins with its first failure.
        for log in ("audit", "usage"):
            self._accounting_failures.inc(0, (log,))
        self.jwks_failures = self._counts(
            "mtlora_jwks_failures", "Reads of a token issuer's keys that failed; the keys read before stay.", "issuer"
        )
        self._tenant_in_flight = self._gauge_by_tenant(
            "mtlora_tenant_requests_in_flight", "Requests of a tenant that are in the engine."
        )
        self._tenant_queued = self._gauge_by_tenant(
            "mtlora_tenant_requests_queued", "Admitted requests of a tenant that wait for their turn."
        )
        queued = self._gauge("mtlora_requests_queued", "Admitted requests that wait for their turn.")
        queued.set_function(self._tenant_queued.total)

    def _define_engine(self) -> None:
        self._not_after = self._gauge(
            "mtlora_tls_certificate_not_after_seconds",
            "When the certificate of gRPC expires, in seconds since 1970.",
            "certificate",
        )
        self.serving = self._gauge("mtlora_serving", "1 while requests are served.")
        self._by_engine: dict[tuple[Lane, int], EngineStats] = {}
        self._workers: dict[Lane, Sequence[WorkerStats]] = {}
        running = self._gauge("mtlora_engine_running_sequences", "Sequences that the engine runs.")
        running.set_function(lambda: self._engine_load().running)
        waiting = self._gauge("mtlora_engine_waiting_sequences", "Sequences that wait in the engine.")
        waiting.set_function(lambda: sum(each.waiting for each in self._engines()))
        kv_cache = self._gauge(
            "mtlora_engine_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1, of the fullest engine."
        )
        kv_cache.set_function(lambda: self._engine_load().kv_cache_usage)
        self._prefix_queries = self._counts(
            "mtlora_engine_prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counts("mtlora_engine_prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counts(
            "mtlora_engine_preemptions", "Sequences preempted because the KV cache was full."
        )
        self._batch = self._histograms("mtlora_engine_step_sequences", "Sequences in a step.", buckets=_BATCH_BUCKETS)
        self._step_tasks = self._histograms(
            "mtlora_engine_step_tasks",
            "Distinct tasks of the sequences that continue after a step. Tasks without own bias count as one.",
            buckets=_BATCH_BUCKETS,
        )
        self._step_adapters = self._histograms(
            "mtlora_engine_step_adapters",
            "Distinct adapter versions of the sequences that continue after a step.",
            buckets=_BATCH_BUCKETS,
        )
        self._restarts = self._counts(
            "mtlora_engine_restarts", "Engines that died or hung and were started again.", "reason"
        )
        for reason in ("died", "hung", "not_started"):
            self._restarts.inc(0, (reason,))
        self.loop_delay = self._histograms(
            "mtlora_event_loop_delay_seconds",
            "How late the server's event loop runs, sampled every `loop_delay_interval_s`.",
            buckets=_DELAY_BUCKETS,
        )
        self.background_ends = self._counts(
            "mtlora_background_ends", "Background work of the server that ended and was started again.", "work"
        )
        self._build = self._gauge(
            "mtlora_build_info",
            "1; version and backbones as labels.",
            "version",
            "python",
            "backbone",
            "vision_backbone",
        )

    def _define_adapters(self) -> None:
        self._adapters = self._gauge("mtlora_adapters", "Adapter versions, by state: loaded or failed.", "state")
        self._tasks = self._gauge("mtlora_tasks", "Tasks that can be asked.")
        self._events = self._counts("mtlora_adapter_events", "Adapter versions that reached a stage.", "stage")
        self._failures = self._counts(
            "mtlora_adapter_failures", "Adapter versions that did not reach a stage.", "stage"
        )
        self.storage_timeouts = self._counts(
            "mtlora_storage_timeouts", "Calls to the adapters' storage that were given up: it did not answer."
        )
        self.adapter_cache_bytes = self._gauge(
            "mtlora_adapter_cache_bytes",
            "Copies of adapters on the disk: of serving versions, and those for rollbacks.",
        )
        self.adapters_resident = self._gauge("mtlora_adapters_resident", "Adapter versions in the engine.")
        self.adapter_evictions = self._counts(
            "mtlora_adapter_evictions", "Adapter versions evicted from the engine for another."
        )
        self.adapter_swap = self._histograms(
            "mtlora_adapter_swap_seconds", "From a version's discovery until it serves.", buckets=_LOAD_BUCKETS
        )
        self.adapter_cold = self._histograms(
            "mtlora_adapter_cold_seconds",
            "How long requests waited for an adapter that was not in the engine.",
            buckets=_LOAD_BUCKETS,
        )
        self.adapter_load = self._histograms(
            "mtlora_adapter_load_seconds", "Time to load an adapter version with all its slots.", buckets=_LOAD_BUCKETS
        )
        self._slots = self._gauge("mtlora_adapter_slots", "Slots that a step can use.")
        self._slots_in_use = self._gauge("mtlora_adapter_slots_in_use", "Slots that hold a task now.")
        self._registered = self._gauge("mtlora_adapter_slots_registered", "Tasks that may take a slot.")
        self._resident = self._gauge("mtlora_adapter_resident_bytes", "Adapter weights in memory, all ranks together.")
        self._loads = self._of_each_lane(
            "mtlora_adapter_weight_loads", "Adapter versions read into memory, on every rank."
        )
        self._evictions = self._of_each_lane(
            "mtlora_adapter_slot_evictions", "Tasks evicted from a slot for another task."
        )
        self._sampled_rows = self._counts(
            "mtlora_routing_sampled_rows", "Rows (token and group) whose routing was sampled.", "adapter"
        )
        self._entropy = self._counts(
            "mtlora_routing_entropy_ratio",
            "Sum over sampled rows of the router's entropy, as a share of its maximum.",
            "adapter",
        )
        self._expert_weight = self._counts(
            "mtlora_routing_expert_weight", "Sum over sampled rows of an expert's weight.", "adapter", "expert"
        )

    def _define_routers(self) -> None:
        self._routers = RouterMetrics(self._engine_load)
        self.registry.register(self._routers)
        self.labels |= {name: ("model_name", *labels) for name, (labels, _) in GAUGES.items()}

    def _engine_load(self) -> EngineLoad:
        engines = self._engines()
        return EngineLoad(
            running=sum(each.running for each in engines),
            waiting=sum(each.waiting for each in engines) + self._tenant_queued.total(),
            kv_cache_usage=max((each.kv_cache_usage for each in engines), default=0.0),
        )

    def _counts(self, name: str, documentation: str, *labels: str) -> CounterFamily:
        self.labels[name] = labels
        return CounterFamily(name, documentation, labels, registry=self.registry)

    def _histograms(self, name: str, documentation: str, *labels: str, buckets: Sequence[float]) -> Histograms:
        self.labels[name] = labels
        return Histograms(name, documentation, labels, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        self.labels[name] = labels
        return Gauge(name, documentation, labels, registry=self.registry)

    def _gauge_by_tenant(self, name: str, documentation: str) -> GaugeByLabel:
        self.labels[name] = ("tenant",)
        return GaugeByLabel(name, documentation, "tenant", value_of=self._top_tenants.label, registry=self.registry)

    def _of_each_lane(self, name: str, documentation: str) -> list[CounterOf]:
        """A counter that follows the engines of both lanes."""
        counts = self._counts(name, documentation)
        return [CounterOf(counts) for _ in Lane]

    def _engines(self) -> tuple[EngineStats, ...]:
        """Each engine's last statistics. From any thread."""
        return tuple(self._by_engine.values())

    # Requests.

    def record_request(
        self, method: str, task: str, tenant: str, status: str, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """Count a finished request, by gRPC status name; tokens are 0 for a request refused early."""
        if task not in ("", UNKNOWN_TASK):
            task = self._top_tasks.count(task)
        tenant = self._top_tenants.count(tenant)
        self._requests.inc(labels=(method, task, status))
        self._tenant_requests.inc(labels=(tenant, status))
        if not prompt_tokens:
            return
        self._prompt_tokens.inc(prompt_tokens, (task,))
        self._completion_tokens.inc(completion_tokens, (task,))
        self._prompt_length.observe(prompt_tokens)
        self._completion_length.observe(completion_tokens)
        self._tenant_tokens.inc(prompt_tokens, (tenant, "prompt"))
        self._tenant_tokens.inc(completion_tokens, (tenant, "completion"))

    def task_label(self, task: str) -> str:
        """The value of the label `task` for a task that can be asked."""
        return self._top_tasks.claim(task)

    def observe_queue(self, seconds: float, exemplar: dict[str, str]) -> None:
        """Record the seconds from a request's receipt until the engine first schedules it."""
        self._queue.observe(seconds, exemplar=exemplar if self._exemplars else None)

    def observe_ttft(self, tenant: str, seconds: float, exemplar: dict[str, str]) -> None:
        """Record the seconds from a request's receipt to its first token."""
        self._ttft.observe(seconds, exemplar=exemplar if self._exemplars else None)
        self._tenant_ttft.observe(seconds, labels=(self._top_tenants.claim(tenant),))

    def observe_e2e(self, tenant: str, seconds: float, exemplar: dict[str, str]) -> None:
        """Record the seconds from a request's receipt to the last token of its complete answer."""
        self._e2e.observe(seconds, exemplar=exemplar if self._exemplars else None)
        self._tenant_e2e.observe(seconds, labels=(self._top_tenants.claim(tenant),))

    def follow_certificate(self, path: str, not_after: Callable[[], float]) -> None:
        """Read a certificate's expiry at every scrape."""
        self._not_after.labels(path).set_function(not_after)

    # Tenants.

    def follow_turns(self, running: Callable[[], Mapping[str, int]], queued: Callable[[], Mapping[str, int]]) -> None:
        """Read each tenant's requests in the engine, and those that wait for their turn, at every scrape."""
        self._tenant_in_flight.read = running
        self._tenant_queued.read = queued

    def record_quota_refusal(self, tenant: str, quota: str) -> None:
        """Count a request refused for a tenant's quota; `quota` is one of a few fixed names."""
        self._refusals.inc(labels=(self._top_tenants.claim(tenant), quota))

    def record_shed(self, tenant: str, reason: str) -> None:
        """Count a request given up under overload; `reason` is one of a few fixed names."""
        self._shed.inc(labels=(self._top_tenants.claim(tenant), reason))

    def record_service(self, tenant: str, service: float) -> None:
        """Count service of a tenant, as the fair queue counts it."""
        self._tenant_service.inc(service, (self._top_tenants.claim(tenant),))

    def record_accounting_failure(self, log: str) -> None:
        """Count a write that failed; `log` is audit or usage."""
        self._accounting_failures.inc(labels=(log,))

    def follow_memory(self, memory: Callable[[], AdapterMemory]) -> None:
        """Read the adapters in the engine's memory at every scrape."""
        self._routers.memory = memory

    # Engine.

    def record_build(self, backbone: str, vision_backbone: str) -> None:
        """Show version and backbones; empty for none."""
        self._build.labels(__version__, platform.python_version(), backbone, vision_backbone).set(1)
        self._routers.model_name = backbone or vision_backbone

    def record_kv_cache(self, cache: KvCache) -> None:
        """Show the language engine's KV cache to routers."""
        self._routers.kv_cache = cache

    def record_engine(self, stats: EngineStats, lane: Lane = Lane.TEXT) -> None:
        """Show one engine's state after a step; with data parallelism there are several engines."""
        self._by_engine[lane, stats.engine] = stats
        self._prefix_queries.inc(stats.prefix_cache_queries)
        self._prefix_hits.inc(stats.prefix_cache_hits)
        self._preemptions.inc(stats.preemptions)
        if sequences := stats.running + stats.finished:
            self._batch.observe(sequences)
        if stats.running:
            self._step_tasks.observe(stats.tasks)
            self._step_adapters.observe(stats.adapters)

    def record_engine_restart(self, reason: str, lane: Lane = Lane.TEXT) -> None:
        """Count a lost engine; `reason` is one of a few fixed names. The next engine's counts begin at 0."""
        self._restarts.inc(labels=(reason,))
        for engine in [engine for engine in self._by_engine if engine[0] is lane]:
            del self._by_engine[engine]
        self._workers.pop(lane, None)
        for counters in (self._loads, self._evictions):
            counters[lane].restart()
        self._show_routing()

    # Adapters.

    def record_catalog(self, *, loaded: int, failed: int, tasks: int) -> None:
        """Show how many adapter versions serve, how many failed, and how many tasks can be asked."""
        self._adapters.labels("loaded").set(loaded)
        self._adapters.labels("failed").set(failed)
        self._tasks.set(tasks)

    def record_stage(self, stage: str, failed_stage: str | None) -> None:
        """Count the stage that an adapter version reached and, if it failed, the stage that it did not reach."""
        self._events.inc(labels=(stage,))
        if failed_stage is not None:
            self._failures.inc(labels=(failed_stage,))

    def record_workers(self, workers: Sequence[WorkerStats], lane: Lane = Lane.TEXT) -> None:
        """Show the adapters of every rank of a lane's engines. Ranks of an engine hold the same slots."""
        if not workers:
            return
        self._loads[lane].set(sum(each.weight_loads for each in workers))
        self._evictions[lane].set(sum(each.slot_evictions for each in workers))
        self._workers[lane] = workers
        workers = [worker for each in self._workers.values() for worker in each]
        self._slots.set(max(each.slots for each in workers))
        self._slots_in_use.set(max(each.slots_in_use for each in workers))
        self._registered.set(max(each.slots_registered for each in workers))
        self._resident.set(sum(each.resident_bytes for each in workers))
        self._show_routing()

    def _show_routing(self) -> None:
        routing = total_routing(each.routing for workers in self._workers.values() for each in workers)
        ranked = sorted(routing.items(), key=lambda item: item[1].rows, reverse=True)
        top, rest = ranked[:TOP_ADAPTERS], [sums for _, sums in ranked[TOP_ADAPTERS:]]
        rows: dict[tuple[str, ...], float] = {(adapter,): sums.rows for adapter, sums in top}
        entropy: dict[tuple[str, ...], float] = {(adapter,): sums.entropy for adapter, sums in top}
        if rest:
            rows[OTHER,] = sum(sums.rows for sums in rest)
            entropy[OTHER,] = sum(sums.entropy for sums in rest)
        self._sampled_rows.replace(rows)
        self._entropy.replace(entropy)
        self._expert_weight.replace(
            {
                (adapter, str(expert)): weight
                for adapter, sums in top
                for expert, weight in enumerate(sums.expert_weights)
            }
        )

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Open the HTTP port; returns it, and a function that closes it. Raises OSError."""
        return serve_metrics(self.registry, host, port)

    def _drop_task(self, task: str) -> None:
        for metric in (self._requests, self._prompt_tokens, self._completion_tokens):
            metric.drop("task", task)

    def _drop_tenant(self, tenant: str) -> None:
        for counts in (self._tenant_requests, self._tenant_tokens, self._refusals, self._shed, self._tenant_service):
            counts.drop("tenant", tenant)
        for histograms in (self._tenant_ttft, self._tenant_e2e):
            histograms.drop("tenant", tenant)
