"""Routers choose a replica for a request: round robin, the client's own placement by adapter, an endpoint picker."""

import random
from collections.abc import Collection, Sequence
from typing import Protocol

import yaml

from deploy.manifests import OVERLAYS, PICKER
from mtlora.client.placement import Rendezvous

# Seconds between two looks at a replica's metrics: the endpoint picker's default.
_REFRESH_S = 0.05


class Observed(Protocol):
    """A replica as its metrics show it. max_resident: most adapters that it holds."""

    max_resident: int

    @property
    def resident(self) -> Collection[int]:
        """Adapters that it holds."""

    @property
    def queued(self) -> int:
        """Requests that wait."""

    @property
    def fill(self) -> float:
        """Share of its KV cache in use, taken to be the share of its sequences."""


class RoundRobin:
    """Choose replicas in turn, like gRPC's round_robin."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def observe(self, now: float, replicas: Sequence[Observed]) -> None:
        """Needs no metrics."""

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        self._next = (self._next + 1) % self._replicas
        return self._next


class AdapterAware:
    """`mtlora.client`'s placement, as if one client sent everything: by adapter, with bounded load.

    adapters: those that the client has read from `ListTasks`, which it deals out.
    """

    def __init__(self, replicas: int, *, adapters: int = 0, slack: float = 1.25, floor: int = 1) -> None:
        self._rendezvous = Rendezvous([f"replica {index}" for index in range(replicas)], slack=slack, floor=floor)
        self._rendezvous.deal_out([str(adapter) for adapter in range(adapters)])

    def observe(self, now: float, replicas: Sequence[Observed]) -> None:
        """Needs no metrics."""

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        return self._rendezvous.choose(str(adapter), in_flight)


class EndpointPicker:
    """Overlay inference-pool's endpoint picker: weighted scores of metrics that are up to 50 ms old."""

    def __init__(self) -> None:
        config = yaml.safe_load((OVERLAYS / "inference-pool" / PICKER).read_text())
        weights = {each["pluginRef"]: each.get("weight", 0) for each in config["schedulingProfiles"][0]["plugins"]}
        self._affinity = weights["lora-affinity-scorer"]
        self._queue, self._cache = weights["queue-scorer"], weights["kv-cache-utilization-scorer"]
        self._random = random.Random(0)
        self._next = 0.0
        # Per replica: adapters, score without the adapter, score of its load.
        self._seen: list[tuple[set[int], float, float]] = []

    def observe(self, now: float, replicas: Sequence[Observed]) -> None:
        if self._seen and now < self._next:
            return
        self._next = now + _REFRESH_S
        queued = [each.queued for each in replicas]
        most, spread = max(queued), (max(queued) - min(queued)) or 1
        self._seen = [
            (
                set(each.resident),
                # The affinity scorer gives a replica without the adapter 0.8 if it has a free slot, else 0.
                0.8 * self._affinity if len(each.resident) < each.max_resident else 0.0,
                self._queue * (most - each.queued) / spread + self._cache * (1 - each.fill),
            )
            for each in replicas
        ]

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        scores = [load + (self._affinity if adapter in resident else absent) for resident, absent, load in self._seen]
        best = max(scores)
        return self._random.choice([index for index, score in enumerate(scores) if score == best])


# `choose` gives the index of the replica for a request of `adapter`, given every replica's requests in flight.
# `observe` comes before, with what the replicas' metrics say.
Router = RoundRobin | AdapterAware | EndpointPicker
ROUTERS = {"round-robin": RoundRobin, "adapter-aware": AdapterAware}
