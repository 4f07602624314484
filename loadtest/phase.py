"""One phase of load in this process: from settings to a recorder full of what happened."""

import asyncio
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from loadtest.arrivals import poisson
from loadtest.connection import Connection
from loadtest.driver import Driver
from loadtest.errors import LoadTestError
from loadtest.recorder import Recorder
from loadtest.settings import Load, Settings
from loadtest.tenants import Tenant
from loadtest.trace import Entry, read_trace
from loadtest.workload import Request, TaskInfo, Workload

# Names beyond these share one histogram each: with thousands, histograms would take gigabytes.
MAX_GROUPS = 128
# Time slices of a window: enough to resample, and to see a run change over time.
MAX_SLICES = 120
# How often the generator looks whether it is late itself.
_LOOK_S = 0.05


@dataclass(frozen=True)
class Share:
    """All that one process needs to run its share of every phase."""

    settings: Settings
    tasks: tuple[TaskInfo, ...]
    tenants: tuple[Tenant, ...]
    index: int = 0
    count: int = 1


@dataclass
class Ran:
    """What one process did in a phase. `cpu_s` is its own processor time over `wall_s` seconds."""

    recorder: Recorder
    cpu_s: float
    wall_s: float
    gone: bool
    stopped: bool


class Generator:
    """Runs phases one after another over one connection; its workload goes on from phase to phase."""

    def __init__(self, share: Share) -> None:
        settings = share.settings
        self._share = share
        self._workload = Workload(settings.workload, share.tasks, share.tenants, index=share.index, count=share.count)
        self._connection: Connection | None = None
        self._phases = 0
        self.driver: Driver | None = None
        self.recorder: Recorder | None = None

    @property
    def workload(self) -> Workload:
        return self._workload

    @property
    def connection(self) -> Connection:
        """The channel, opened on first use, on the event loop."""
        if self._connection is None:
            self._connection = Connection(self._share.settings.target)
        return self._connection

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.__aexit__(None, None, None)

    async def run(self, load: Load, began: float, requests: list[Request] | None = None) -> Ran:
        """Run this process's share of one phase, which starts at `began` on the monotonic clock."""
        self._phases += 1
        share = self._share
        entries = read_trace(load.trace) if load.trace else []
        window = _window(load, entries)
        recorder = self.recorder = Recorder(
            window, share.settings.objective, self._top(self._workload.tasks, self._workload.task_weights),
            self._top([tenant.name for tenant in share.tenants], self._workload.tenant_weights), _slices(window),
        )  # fmt: skip
        if share.settings.outcomes:
            recorder.keep_outcomes()
        target = share.settings.target
        unary = target.unary or load.unary
        driver = self.driver = Driver(self.connection, recorder, began, timeout_s=target.timeout_s, unary=unary)
        cpu, wall = _cpu_seconds(), time.monotonic()
        watching = asyncio.create_task(_watch_own_delay(recorder))
        try:
            if load.in_flight is not None:
                await driver.closed_loop(self._closed(load, requests), self._part(load.in_flight), window[1])
            else:
                await driver.open_loop(self._trace(load, entries) if load.trace else self._poisson(load))
        finally:
            watching.cancel()
        ended = time.monotonic()
        if driver.stopped or not math.isfinite(recorder.window[1]):
            recorder.end_window(recorder.last_ended)
        return Ran(recorder, _cpu_seconds() - cpu, ended - wall, driver.gone, driver.stopped)

    def stop(self) -> None:
        """End the phase that runs, keeping what it recorded."""
        if self.driver is not None:
            self.driver.stop()

    def _poisson(self, load: Load) -> Iterator[tuple[float, Request]]:
        assert load.rate is not None
        assert load.duration_s is not None
        share = self._share
        seed = f"{share.settings.workload.seed}/{load.name}/{self._phases}/{share.index}"
        for moment in poisson(load.rate / share.count, load.warm_up_s + load.duration_s, seed):
            yield moment, next(self._workload)

    def _trace(self, load: Load, entries: list[Entry]) -> list[tuple[float, Request]]:
        # A list: every name in the trace is checked before anything is sent.
        return [
            (entry.at / load.speed, self._workload.request(entry))
            for entry in entries[self._share.index :: self._share.count]
        ]

    def _closed(self, load: Load, requests: list[Request] | None) -> Iterator[Request]:
        if requests is not None:
            return islice(requests, self._share.index, None, self._share.count)
        if load.requests is not None:
            return islice(self._workload, self._part(load.requests))
        return iter(self._workload)

    def _part(self, whole: int) -> int:
        """This process's part of a number, the parts adding up to it."""
        each, more = divmod(whole, self._share.count)
        return each + (self._share.index < more)

    def _top(self, names: list[str], weights: list[float]) -> list[str]:
        ranked = sorted(zip(names, weights, strict=True), key=lambda pair: -pair[1])
        return [name for name, _ in ranked[:MAX_GROUPS]]


def _window(load: Load, entries: list[Entry]) -> tuple[float, float]:
    if load.duration_s is not None:
        return load.warm_up_s, load.warm_up_s + load.duration_s
    if not entries:
        return 0.0, math.inf
    last = entries[-1].at / load.speed
    if last < load.warm_up_s:
        raise LoadTestError(f"{load.trace}: ends after {last:g} s, within the warm-up of {load.warm_up_s:g} s")
    # What is due at the last moment is within.
    return load.warm_up_s, math.nextafter(last, math.inf)


def _slices(window: tuple[float, float]) -> int:
    seconds = window[1] - window[0]
    return min(MAX_SLICES, max(1, round(seconds))) if math.isfinite(seconds) else 0


async def _watch_own_delay(recorder: Recorder) -> None:
    """Record by how much this process does late what is due; whatever it measures meanwhile is longer by as much."""
    while True:
        due = time.monotonic() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        recorder.held_up.record(max(0.0, time.monotonic() - due))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
