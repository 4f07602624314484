"""Prometheus metrics, in a registry of their own, on an HTTP port of their own."""

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from mtlora import __version__

if TYPE_CHECKING:
    from server.catalog import Catalog
    from server.engine import EngineStats

UNKNOWN_TASK = "unknown"
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_QUEUE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Every metric of the server. Label `task` takes only ids of served tasks, and "unknown"."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry: Any = {"registry": self.registry}
        self.requests = Counter(
            "mtlora_requests", "Finished requests, by gRPC status.", ["method", "task", "status"], **registry
        )
        self.tenant_requests = Counter(
            "mtlora_tenant_requests", "Finished requests, by tenant and gRPC status.", ["tenant", "status"], **registry
        )
        self.tenant_tokens = Counter(
            "mtlora_tenant_tokens", "Prompt and generated tokens, by tenant.", ["tenant"], **registry
        )
        self.tenant_service = Counter(
            "mtlora_tenant_service", "Service as the fair queue counts it, by tenant.", ["tenant"], **registry
        )
        self.tenants = Gauge("mtlora_tenants", "Tenants that the server knows.", **registry)
        self.tenants_refused = Counter(
            "mtlora_tenants_reload_failures", "Changed tenants files that were refused.", **registry
        )
        self.queued = Gauge("mtlora_requests_queued", "Admitted requests that wait for the engine.", **registry)
        self.in_flight = Gauge("mtlora_requests_in_flight", "Admitted requests that are not finished.", **registry)
        self.prompt_tokens = Counter("mtlora_prompt_tokens", "Prompt tokens.", ["task"], **registry)
        self.completion_tokens = Counter("mtlora_completion_tokens", "Generated tokens.", ["task"], **registry)
        self.ttft = Histogram(
            "mtlora_time_to_first_token_seconds", "From receipt to first token.", buckets=_LATENCY_BUCKETS, **registry
        )
        self.itl = Histogram(
            "mtlora_inter_token_latency_seconds", "Between tokens of a sequence.", buckets=_ITL_BUCKETS, **registry
        )
        self.e2e = Histogram(
            "mtlora_request_seconds", "From receipt to the end of the answer.", buckets=_LATENCY_BUCKETS, **registry
        )
        self.queue = Histogram(
            "mtlora_queue_seconds", "From receipt until first scheduled.", buckets=_QUEUE_BUCKETS, **registry
        )
        self.adapters = Gauge("mtlora_adapters", "Adapter versions, by state: loaded or failed.", ["state"], **registry)
        self.tasks = Gauge("mtlora_tasks", "Tasks that can be asked.", **registry)
        self.engine_restarts = Counter(
            "mtlora_engine_restarts", "Engines that died or hung, and were replaced.", **registry
        )
        self.serving = Gauge("mtlora_serving", "1 while requests are served.", **registry)
        self.running = Gauge("mtlora_engine_running_sequences", "Sequences that the engine runs.", **registry)
        self.waiting = Gauge("mtlora_engine_waiting_sequences", "Sequences that wait in the engine.", **registry)
        self.kv_cache = Gauge("mtlora_engine_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", **registry)
        self.prefix_queries = Counter(
            "mtlora_engine_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", **registry
        )
        self.prefix_hits = Counter("mtlora_engine_prefix_cache_hits", "Prompt tokens found there.", **registry)
        self.build = Gauge(
            "mtlora_build_info", "1; what runs here, as labels.", ["version", "python", "backbone"], **registry
        )

    def record_build(self, backbone: str) -> None:
        self.build.labels(__version__, platform.python_version(), backbone).set(1)

    def record_catalog(self, catalog: "Catalog") -> None:
        self.adapters.labels("loaded").set(len(catalog.adapters))
        self.adapters.labels("failed").set(len(catalog.failures))
        self.tasks.set(len(catalog.tasks))

    def record_service(self, tenant: str, service: float) -> None:
        self.tenant_service.labels(tenant).inc(service)

    def record_engine(self, stats: "EngineStats") -> None:
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_cache.set(stats.kv_cache_usage)
        self.prefix_queries.inc(stats.prefix_cache_queries)
        self.prefix_hits.inc(stats.prefix_cache_hits)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Open the HTTP port; returns it, and what closes it. Raises OSError where it cannot be opened."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port, server.shutdown
