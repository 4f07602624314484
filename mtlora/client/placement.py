"""Chooses a server that holds the call's adapter, by rendezvous hashing with bounded load.

Each adapter orders the servers by a hash (Thaler and Ravishankar, 1998). A call goes to the first server whose calls in
flight are not far above the mean (Mirrokni, Thorup and Zadimoghaddam, 2018). So few servers get an adapter's calls, a
popular adapter spreads to more of them, and adding or removing a server moves few adapters. Known adapters are divided
evenly: otherwise one server might evict adapters while others have room.
"""

import functools
import hashlib
import math
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

# Number of cached orders.
_REMEMBERED = 65_536
# The most adapters that may have the same server first, as a multiple of the mean.
_MOST_ADAPTERS = 1.05


@dataclass(frozen=True)
class Placement:
    """Sends an adapter's calls to the servers that hold it, instead of to all servers in turn.

    slack: the most calls in flight of a server, as a multiple of the mean. floor: with at most this many calls in
    flight, a server never counts as busy. refresh_s: seconds after which a name is resolved again. learn_s: seconds
    between two look-ups of unknown tasks.
    """

    slack: float = 2.0
    floor: int = 8
    refresh_s: float = 30.0
    learn_s: float = 10.0


class Rendezvous:
    """Chooses among servers by stable names, such as addresses."""

    def __init__(self, servers: Sequence[str], *, slack: float = 1.25, floor: int = 1) -> None:
        self._servers, self._slack, self._floor = servers, slack, floor
        self._homes: dict[str, int] = {}
        self.order = functools.lru_cache(_REMEMBERED)(self._order)

    def deal_out(self, keys: Collection[str]) -> None:
        """Divide keys evenly among servers; clients that know the same keys divide them in the same way."""
        most = math.ceil(_MOST_ADAPTERS * len(keys) / len(self._servers))
        counts, homes = [0] * len(self._servers), dict[str, int]()
        self._homes = {}
        for key in sorted(keys):
            homes[key] = next(index for index in self._order(key) if counts[index] < most)
            counts[homes[key]] += 1
        self._homes = homes
        self.order.cache_clear()

    def choose(self, key: str, in_flight: Sequence[int], usable: Collection[int] | None = None) -> int:
        """The index of the server for a key, given each one's calls in flight. usable: indices; None means all."""
        usable = usable or range(len(self._servers))
        calls = sum(in_flight[index] for index in usable)
        bound = max(self._floor, self._slack * (calls + 1) / len(usable))
        for index in self.order(key):
            if index in usable and in_flight[index] + 1 <= bound:
                return index
        return min(usable, key=in_flight.__getitem__)

    def _order(self, key: str) -> tuple[int, ...]:
        """All servers in the key's order."""
        scores = [hashlib.blake2b(f"{server}\0{key}".encode(), digest_size=8).digest() for server in self._servers]
        home = self._homes.get(key)
        return tuple(sorted(range(len(scores)), key=lambda index: (index != home, scores[index])))


def resolve(address: str) -> tuple[str, ...]:
    """The servers behind a gRPC target, each as HOST:PORT: ipv4:A:1,B:2, ipv6:[A]:1, dns:///NAME:PORT or NAME:PORT.

    Raises OSError for a name that cannot be resolved.
    """
    scheme, _, rest = address.partition(":")
    if scheme in ("ipv4", "ipv6"):
        return tuple(sorted(rest.split(",")))
    name, _, port = address.removeprefix("dns:").rpartition("/")[2].rpartition(":")
    found = {info[4][0] for info in socket.getaddrinfo(name.strip("[]"), port, type=socket.SOCK_STREAM)}
    return tuple(sorted(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}" for host in found))


class Keys:
    """The placement key of each request: its task's adapter, or its document."""

    def __init__(self, learn_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._learn_s, self._clock = learn_s, clock
        self._adapters: dict[str, str] = {}
        # Keys derived from documents' texts, by the document id that a server returned.
        self._documents: dict[str, str] = {}
        self._learnt_at = -math.inf

    def unknown(self, request: Any) -> bool:
        """Whether the request's task is unknown and should be looked up; true at most once in `learn_s`."""
        task = _task(request)
        if not task or task in self._adapters or self._clock() < self._learnt_at + self._learn_s:
            return False
        self._learnt_at = self._clock()
        return True

    @property
    def adapters(self) -> set[str]:
        """All known adapters."""
        return set(self._adapters.values())

    def learn(self, adapters: Mapping[str, str]) -> None:
        """Store the tasks' adapters."""
        self._adapters |= adapters

    def key(self, request: Any) -> str:
        """A document's calls meet where its tokens are cached; all others where their first task's adapter is."""
        if isinstance(request, pb.AnalyzeRequest):
            if name := request.document_id:
                return self._documents.get(name, name)
            return hashlib.blake2b(request.document.encode(), digest_size=16).hexdigest()
        task = _task(request)
        return self._adapters.get(task, task)

    def note(self, request: Any, key: str, reply: Any) -> None:
        """Learn from an answer which adapter a task has, or which id a document got."""
        if isinstance(request, pb.AnalyzeRequest):
            if reply.document_id not in self._documents:
                self._documents[reply.document_id] = key
                while len(self._documents) > _REMEMBERED:
                    del self._documents[next(iter(self._documents))]
        elif isinstance(request, pb.GenerateRequest) and (name := reply.summary.adapter_name):
            self._adapters[request.task_id] = name
        elif isinstance(request, pb.ClassifyRequest):
            known = {each.task_id: each.summary.adapter_name for each in reply.results}
            self._adapters |= {task_id: name for task_id, name in known.items() if name}


def _task(request: Any) -> str:
    """The task of a request, or of the first of a batch; empty if it has none."""
    if isinstance(request, pb.GenerateBatchRequest):
        return _task(request.items[0]) if request.items else ""
    if isinstance(request, pb.ClassifyRequest):
        return request.task_ids[0] if request.task_ids else ""
    return getattr(request, "task_id", "")
