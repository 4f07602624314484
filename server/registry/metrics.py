"""The registry's metrics. Labels are stages alone: adapters come and go, and a label lives as long as the process."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.registry.events import Event

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class RegistryMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        into: Any = {"registry": registry}
        self._events = Counter("mtlora_adapter_events", "Adapter versions that reached a stage.", ["stage"], **into)
        self._failures = Counter(
            "mtlora_adapter_failures", "Adapter versions that did not reach a stage.", ["stage"], **into
        )
        self.resident = Gauge("mtlora_adapters_resident", "Adapter versions in the engine.", **into)
        self.swap = Histogram(
            "mtlora_adapter_swap_seconds", "From a version's discovery until it serves.", buckets=_SECONDS, **into
        )
        self.cold = Histogram(
            "mtlora_adapter_cold_seconds",
            "What requests waited whose adapter was not in the engine.",
            buckets=_SECONDS,
            **into,
        )

    def record(self, event: Event) -> None:
        self._events.labels(event.stage.value).inc()
        if event.failed_stage is not None:
            self._failures.labels(event.failed_stage.value).inc()
