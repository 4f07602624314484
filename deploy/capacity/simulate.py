"""Discrete-event simulation: requests arrive, a router sends them to replicas, each replica runs step after step.

A replica schedules like the engine. It takes waiting requests first come, first served, while the batch and the step's
token budget have room. It reads a request's prompt in its first step, and every running sequence gains a token a step.
If an adapter's weights are not in memory, it loads them first and evicts the least recently used ones.
"""

import heapq
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploy.capacity.routing import Router
from deploy.capacity.service import ServiceModel


@dataclass(slots=True)
class Request:
    """A request. Times in seconds; the simulation fills in `first_token`, `finished` and `cold`."""

    arrival: float
    task: int
    adapter: int
    prompt_tokens: int
    completion_tokens: int
    first_token: float = 0.0
    finished: float = 0.0
    # Whether it waited for its adapter.
    cold: bool = False


@dataclass(frozen=True)
class Memory:
    """Adapter versions that a replica keeps in memory, and seconds to load another."""

    adapters: int
    load_seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation. Times in seconds, for requests that arrived after the warm-up."""

    throughput: float
    ttft: np.ndarray = field(repr=False)
    e2e: np.ndarray = field(repr=False)
    loads: int = 0
    # Share of requests whose adapter was in memory.
    hit_rate: float = 1.0

    def percentiles(self, values: np.ndarray) -> tuple[float, float, float]:
        """p50, p95 and p99."""
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return float(p50), float(p95), float(p99)


class Replica:
    """One engine. `begin_step` and `end_step` run a step."""

    def __init__(self, model: ServiceModel, memory: Memory | None) -> None:
        self._model = model
        self._memory = memory
        self.waiting: deque[Request] = deque()
        # (number of the step that ends it, order, request)
        self._running: list[tuple[int, int, Request]] = []
        self._fresh: list[Request] = []
        self._step = 0
        self._order = 0
        self._adapters: dict[int, int] = {}
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.max_resident = memory.adapters if memory else sys.maxsize
        self.busy = False
        self.loads = 0

    def begin_step(self, now: float) -> float:
        """Take waiting requests and start a step; return the time of its end."""
        model, tokens, load = self._model, 0, 0.0
        self._fresh = []
        while self.waiting and len(self._running) < model.max_num_seqs:
            request = self.waiting[0]
            if self._fresh and tokens + request.prompt_tokens > model.max_batched_tokens:
                break
            self.waiting.popleft()
            tokens += request.prompt_tokens
            if loading := self._touch(request.adapter):
                load += loading
                request.cold = True
            self._order += 1
            heapq.heappush(self._running, (self._step + request.completion_tokens, self._order, request))
            self._adapters[request.adapter] = self._adapters.get(request.adapter, 0) + 1
            self._fresh.append(request)
        return now + load + model.step(len(self._running), tokens, len(self._adapters))

    def end_step(self, now: float) -> list[Request]:
        """End the step; return the requests that it finished."""
        for request in self._fresh:
            request.first_token = now
        self._step += 1
        done = []
        while self._running and self._running[0][0] <= self._step:
            request = heapq.heappop(self._running)[2]
            request.finished = now
            left = self._adapters[request.adapter] - 1
            if left:
                self._adapters[request.adapter] = left
            else:
                del self._adapters[request.adapter]
            done.append(request)
        return done

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting)

    @property
    def fill(self) -> float:
        """Sequences that run, of those that may."""
        return len(self._running) / self._model.max_num_seqs

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self.waiting

    def _touch(self, adapter: int) -> float:
        """Use an adapter's weights; return the seconds to load them."""
        if self._memory is None:
            return 0.0
        if adapter in self.resident:
            self.resident.move_to_end(adapter)
            return 0.0
        self.resident[adapter] = None
        self.loads += 1
        if len(self.resident) > self._memory.adapters:
            self.resident.popitem(last=False)
        return self._memory.load_seconds


def simulate(
    requests: Iterable[Request],
    replicas: int,
    model: ServiceModel,
    router: Router,
    *,
    memory: Memory | None = None,
    warm_up: float = 0.0,
) -> Outcome:
    """Run requests, which must be in order of arrival, through `replicas` replicas until the last one ends.

    Throughput counts requests that finished between the warm-up's end and the last arrival.
    """
    engines = [Replica(model, memory) for _ in range(replicas)]
    in_flight = [0] * replicas
    events: list[tuple[float, int, int]] = []
    finished: list[Request] = []
    arrivals = iter(requests)
    arriving = next(arrivals, None)
    last_arrival, count = 0.0, 0
    half = model.overhead / 2

    def begin(index: int, now: float) -> None:
        nonlocal count
        engine = engines[index]
        engine.busy = True
        count += 1
        heapq.heappush(events, (engine.begin_step(now), count, index))

    while arriving is not None or events:
        if arriving is not None and (not events or arriving.arrival + half <= events[0][0]):
            last_arrival = arriving.arrival
            router.observe(last_arrival, engines)
            index = router.choose(arriving.adapter, in_flight)
            in_flight[index] += 1
            engines[index].waiting.append(arriving)
            if not engines[index].busy:
                begin(index, arriving.arrival + half)
            arriving = next(arrivals, None)
            continue
        now, _, index = heapq.heappop(events)
        engine = engines[index]
        done = engine.end_step(now)
        in_flight[index] -= len(done)
        finished += done
        if engine.idle:
            engine.busy = False
        else:
            begin(index, now)
    counted = [request for request in finished if request.arrival >= warm_up]
    in_time = sum(warm_up <= request.finished <= last_arrival for request in finished)
    return Outcome(
        throughput=in_time / (last_arrival - warm_up) if last_arrival > warm_up else 0.0,
        ttft=np.array([request.first_token + half - request.arrival for request in counted]),
        e2e=np.array([request.finished + half - request.arrival for request in counted]),
        loads=sum(engine.loads for engine in engines),
        hit_rate=1 - sum(request.cold for request in counted) / len(counted) if counted else 1.0,
    )


def poisson(
    rate: float,
    seconds: float,
    *,
    tasks: int,
    adapters: int,
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
) -> list[Request]:
    """Requests that arrive independently of each other, `rate` a second.

    lengths: (prompt, completion) tokens to draw from. The tasks' popularity follows Zipf's law; tasks are dealt out to
    the adapters by turns.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(rate * seconds))
    arrivals = np.sort(rng.uniform(0, seconds, count))
    weights = 1 / np.arange(1, tasks + 1)
    drawn = rng.choice(tasks, count, p=weights / weights.sum())
    # Spread popular tasks over adapters at random, or the first adapters would get them all.
    home = random.Random(seed).sample(range(tasks), tasks)
    which = rng.integers(len(lengths), size=count)
    return [
        Request(float(at), int(task), home[task] % adapters, *lengths[int(i)])
        for at, task, i in zip(arrivals, drawn, which, strict=True)
    ]
