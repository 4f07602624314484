"""Quotas, turns and the door, wired as the server does it; and a clock that a test moves."""

import time
from collections.abc import Callable

from server.accounting import Usage
from server.job import Lane
from server.scheduling import Admission, Quotas, Scheduler, State, Turns
from server.telemetry.metrics import Metrics


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Front:
    """What a request passes before the engine; `admission` is open."""

    def __init__(
        self,
        turns: int = 2,
        max_queued: int = 4,
        *,
        image_turns: int = 1,
        most_batch: int | None = None,
        max_in_flight: int = 1000,
        spare: int = 0,
        usage: Usage | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        metrics = metrics or Metrics()
        self.turns = {Lane.TEXT: Turns(turns, most_batch or turns), Lane.IMAGES: Turns(image_turns, image_turns)}
        self.quotas = Quotas(metrics, clock)
        self.scheduler = Scheduler(self.turns, max_queued, self.quotas, metrics, clock)
        usage = usage or Usage(None, metrics)
        self.admission = Admission(max_in_flight, self.scheduler, self.quotas, usage, metrics, spare=spare)
        self.admission.state = State.SERVING

    @property
    def running(self) -> int:
        """Requests that have their turn, of any engine."""
        return sum(turns.running for turns in self.turns.values())

    @property
    def queued(self) -> int:
        """Requests that wait for their turn."""
        return sum(self.scheduler.queued_by_tenant().values())
