"""Routers choose a replica for a request: round robin, or the client's own placement by adapter."""

from collections.abc import Sequence

from mtlora.client.placement import Rendezvous


class RoundRobin:
    """One after the other, like gRPC's round_robin."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        self._next = (self._next + 1) % self._replicas
        return self._next


class AdapterAware:
    """`mtlora.client`'s placement, as if one client sent everything: by adapter, with bounded load."""

    def __init__(self, replicas: int, *, slack: float = 1.25, floor: int = 1) -> None:
        self._rendezvous = Rendezvous([f"replica {index}" for index in range(replicas)], slack=slack, floor=floor)

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        return self._rendezvous.choose(str(adapter), in_flight)


# `choose` gives the index of the replica for a request of `adapter`, given every replica's requests in flight.
Router = RoundRobin | AdapterAware
ROUTERS = {"round-robin": RoundRobin, "adapter-aware": AdapterAware}
