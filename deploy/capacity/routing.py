"""Routers choose a replica for a request: round robin, or by adapter with bounded consistent hashing."""

import bisect
import hashlib
from collections.abc import Sequence

_POINTS = 64


class RoundRobin:
    """One after the other, like gRPC's round_robin."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        self._next = (self._next + 1) % self._replicas
        return self._next


class AdapterAware:
    """The adapter's first replica on a hash ring, or the next if that one has more than `slack` times the mean load.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018): an adapter's requests meet on few
    replicas, a popular adapter spreads, and one replica more or less moves few adapters.
    """

    def __init__(self, replicas: int, *, slack: float = 1.25) -> None:
        ring = sorted((_hash(f"{replica}/{point}"), replica) for replica in range(replicas) for point in range(_POINTS))
        self._hashes = [hash_ for hash_, _ in ring]
        self._ring = [replica for _, replica in ring]
        self._slack = slack
        self._starts: dict[int, int] = {}

    def choose(self, adapter: int, in_flight: Sequence[int]) -> int:
        start = self._starts.get(adapter)
        if start is None:
            start = self._starts[adapter] = bisect.bisect(self._hashes, _hash(f"adapter {adapter}"))
        bound = self._slack * (sum(in_flight) + 1) / len(in_flight)
        for step in range(len(self._ring)):
            replica = self._ring[(start + step) % len(self._ring)]
            if in_flight[replica] + 1 <= max(1.0, bound):
                return replica
        return min(range(len(in_flight)), key=in_flight.__getitem__)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


# `choose` gives the index of the replica for a request of `adapter`, given every replica's requests in flight.
Router = RoundRobin | AdapterAware
ROUTERS = {"round-robin": RoundRobin, "adapter-aware": AdapterAware}
