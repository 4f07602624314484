"""Keeps an engine running: notices an engine that died or hangs, and starts another."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtlora.control_group import out_of_memory_kills
from server.engine.engine import BaseEngine, EngineStartError
from server.errors import EngineDeadError
from server.telemetry.logs import get_logger

logger = get_logger("engine")

# Seconds between checks for a hang. Rarely, because every wake-up of the event loop delays the next step.
_LOOK_INTERVAL_S = 2.0


@dataclass(frozen=True)
class EngineFailure:
    """Why an engine was lost: the kind of failure, and the reason in words."""

    kind: Literal["died", "hung", "not_started"]
    reason: str


class EngineGaveUpError(Exception):
    """The engine failed too often to try again."""


class Supervisor:
    """`make` makes an engine that is not started yet. An engine fails if it dies, or makes no step for `hang_s` seconds
    while work waits. More than `max_failures` failures within `window_s` seconds end the supervision.

    on_start: gets each engine that has started. on_loss: called as soon as an engine is lost.

    `load`, `unload` and `warm_up` go to the running engine.
    """

    def __init__(
        self,
        make: Callable[[], BaseEngine],
        on_start: Callable[[Any], Awaitable[None]],
        on_loss: Callable[[EngineFailure], Awaitable[None]],
        *,
        hang_s: float,
        max_failures: int,
        window_s: float,
    ) -> None:
        self.engine: BaseEngine | None = None
        self._make = make
        self._on_start = on_start
        self._on_loss = on_loss
        self._hang_s = hang_s
        self._max_failures = max_failures
        self._window_s = window_s
        self._failures: deque[float] = deque()
        self._kills = 0
        # While an engine starts, it cannot be stopped.
        self.starting = False

    async def start(self) -> None:
        """Start an engine and hand it to `on_start`. Raises EngineStartError, or EngineDeadError if it dies."""
        engine = self.engine = self._make()
        self.starting = True
        self._kills = out_of_memory_kills()
        try:
            await asyncio.to_thread(engine.start)
        finally:
            self.starting = False
        await self._or_failure(self._on_start(engine))

    async def run(self) -> None:
        """Watch the started engine and its successors. Ends only in EngineGaveUpError."""
        while True:
            failure = await self._failure()
            began = time.monotonic()
            await self._replace(failure)
            logger.info("engine restarted", extra={"fields": {"seconds": round(time.monotonic() - began, 1)}})

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        """See `BaseEngine.load`."""
        await self._running.load(folder, slots)

    async def unload(self, slots: Sequence[Any]) -> None:
        """See `BaseEngine.unload`."""
        await self._running.unload(slots)

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None:
        """See `BaseEngine.warm_up`."""
        await self._running.warm_up(slot, short=short)

    @property
    def _running(self) -> BaseEngine:
        if self.engine is None:
            raise EngineDeadError
        return self.engine

    async def _failure(self) -> EngineFailure:
        """Wait for the engine to fail; returns how."""
        while True:
            engine = self._running
            if not engine.alive:
                if out_of_memory_kills() > self._kills:
                    return EngineFailure("died", "a process of it was killed at this container's memory limit")
                return EngineFailure("died", "a process of it has died")
            if (stalled := engine.stalled_s) > self._hang_s:
                return EngineFailure("hung", f"no step for {stalled:.0f} s while work waited")
            await engine.ended(_LOOK_INTERVAL_S)

    async def _replace(self, failure: EngineFailure) -> None:
        while True:
            logger.error("engine lost", extra={"fields": {"reason": failure.reason}})
            await self._on_loss(failure)
            self._count_failure(failure.reason)
            await self._dispose()
            try:
                await self.start()
                return
            except EngineStartError as error:
                failure = EngineFailure("not_started", str(error))
            except EngineDeadError:
                failure = EngineFailure("died", "it died while its adapters were loaded")

    async def _or_failure(self, work: Awaitable[None]) -> None:
        """Wait for `work`. If the engine fails first, mark it as lost and raise EngineDeadError."""
        working, failing = asyncio.ensure_future(work), asyncio.create_task(self._failure())
        try:
            await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failing.cancel()
            # Wait until this watch has ended, because `run` will watch the engine next.
            await asyncio.wait({failing})
        if not working.done():
            self._running.lose()
        await working

    async def _dispose(self) -> None:
        if self.engine is not None:
            self.engine.lose()
            await asyncio.to_thread(self.engine.shutdown)

    def _count_failure(self, reason: str) -> None:
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] < now - self._window_s:
            self._failures.popleft()
        if len(self._failures) > self._max_failures:
            if self.engine is not None:
                self.engine.lose()
            raise EngineGaveUpError(
                f"the engine failed {len(self._failures)} times within {self._window_s:g} s, the last time: {reason}"
            )
