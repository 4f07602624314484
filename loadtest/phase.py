"""One phase of load: from its settings to a filled recorder."""

import asyncio
import math
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mtlora_pb.v1 import inference_pb2 as pb

from loadtest import LoadTestError
from loadtest.connection import Connection
from loadtest.driver import Driver
from loadtest.recorder import Recorder
from loadtest.settings import PhaseSettings, Settings
from loadtest.tenants import Tenant
from loadtest.trace import Entry, read_trace
from loadtest.workload import Request, Workload

# Most tasks, or tenants, with an own group; the others share one, because thousands of histograms would take gigabytes.
MAX_GROUPS = 128
# Interval at which the generator checks its own delay.
_LOOK_S = 0.05
_LINE_EVERY_S = 5.0
# Time between setting a phase up and its start.
_HEAD_START_S = 0.05


@dataclass
class Ran:
    """A finished phase. `cpu_s` is this process's own processor time over `wall_s` seconds.

    `gone`: the server went away. `stopped`: the phase was cut short.
    """

    recorder: Recorder
    cpu_s: float
    wall_s: float
    gone: bool
    stopped: bool


class Generator:
    """Runs phases one after another over one connection. Its workload continues from phase to phase."""

    def __init__(
        self, settings: Settings, connection: Connection, tasks: Sequence[pb.Task], tenants: Sequence[Tenant]
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._tenants = tenants
        self.workload = Workload(settings, tasks, tenants)
        self._phases = 0
        self._driver: Driver | None = None

    async def run(
        self, name: str, load: PhaseSettings, requests: Sequence[Request] | None = None, *, unary: bool = False
    ) -> Ran:
        """Run one phase. `requests` replace drawn ones; `unary` overrides the settings and asks for whole answers."""
        self._phases += 1
        settings, workload = self._settings, self.workload
        entries = read_trace(load.trace) if load.trace else []
        window = _window(load, entries)
        recorder = Recorder(
            window, settings, _top(workload.tasks, workload.task_weights),
            _top([tenant.name for tenant in self._tenants], workload.tenant_weights),
        )  # fmt: skip
        recorder.outcomes = [] if settings.outcomes else None
        began = time.monotonic() + _HEAD_START_S
        driver = self._driver = Driver(
            self._connection, recorder, began, timeout_s=settings.timeout_s, unary=unary or settings.unary
        )
        cpu, wall = _cpu_seconds(), time.monotonic()
        watching = [
            asyncio.create_task(watch) for watch in (_watch_own_delay(recorder), _print_progress(name, recorder))
        ]
        try:
            if load.in_flight is not None:
                drawn = iter(requests) if requests is not None else islice(workload, load.requests)
                await driver.closed_loop(drawn, load.in_flight, window[1])
            elif load.trace is not None:
                # Build the whole list first: it checks every name in the trace before anything is sent.
                await driver.open_loop([(entry.at / load.speed, workload.request(entry)) for entry in entries])
            else:
                await driver.open_loop(self._poisson(name, load, window[1]))
        finally:
            for task in watching:
                task.cancel()
        ended = time.monotonic()
        if driver.stopped or not math.isfinite(recorder.window[1]):
            recorder.end_window(recorder.last_ended)
        return Ran(recorder, _cpu_seconds() - cpu, ended - wall, driver.gone, driver.stopped)

    def stop(self) -> None:
        """End the running phase and keep what it recorded."""
        if self._driver is not None:
            self._driver.stop()

    def _poisson(self, name: str, load: PhaseSettings, seconds: float) -> Iterator[tuple[float, Request]]:
        assert load.rate is not None
        for moment in poisson(load.rate, seconds, f"{self._settings.seed}/{name}/{self._phases}"):
            yield moment, next(self.workload)


def poisson(rate: float, seconds: float, seed: str) -> Iterator[float]:
    """Times of a Poisson process with `rate` a second, for so many seconds; the same for the same seed."""
    rng = random.Random(seed)
    now = rng.expovariate(rate)
    while now < seconds:
        yield now
        now += rng.expovariate(rate)


def _top(names: list[str], weights: list[float]) -> list[str]:
    ranked = sorted(zip(names, weights, strict=True), key=lambda pair: -pair[1])
    return [name for name, _ in ranked[:MAX_GROUPS]]


def _window(load: PhaseSettings, entries: list[Entry]) -> tuple[float, float]:
    if load.duration_s is not None:
        return load.warm_up_s, load.warm_up_s + load.duration_s
    if not entries:
        return 0.0, math.inf
    last = entries[-1].at / load.speed
    if last < load.warm_up_s:
        raise LoadTestError(f"{load.trace}: ends after {last:g} s, within the warm-up of {load.warm_up_s:g} s")
    # The window includes the last request.
    return load.warm_up_s, math.nextafter(last, math.inf)


async def _watch_own_delay(recorder: Recorder) -> None:
    """Record this process's own delay, which lengthens every latency that it measures meanwhile."""
    while True:
        due = time.monotonic() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        recorder.held_up.record(max(0.0, time.monotonic() - due))


async def _print_progress(name: str, recorder: Recorder) -> None:
    """Print a line every few seconds."""
    group, seconds, answered = recorder.everything, 0.0, 0
    while True:
        await asyncio.sleep(_LINE_EVERY_S)
        seconds += _LINE_EVERY_S
        latencies = [
            f", {label} p50 {latency.quantile(0.5):.2f} s p95 {latency.quantile(0.95):.2f} s"
            for label, latency in (("TTFT", group.ttft), ("E2E", group.e2e))
            if group.ok
        ]
        print(
            f"  {name}: {seconds:.0f} s, sent {group.offered}, answered {group.ok} "
            f"({(group.ok - answered) / _LINE_EVERY_S:.1f}/s), failed {sum(group.statuses.values()) - group.ok}, "
            f"in flight {recorder.in_flight}{''.join(latencies)}",
            flush=True,
        )
        answered = group.ok


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
