"""Adapter events: each is logged, counted in metrics and sent to every watcher."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Self

from server.registry.version import AdapterVersion, ElsewhereError, Stage, StageError
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

# A watcher with more unread events than this is dropped.
_WATCHER_BACKLOG = 1024


@dataclass(frozen=True)
class Event:
    """`failed_stage`: the stage that a FAILED version did not reach; None if this server has no engine for it.

    `content` is empty before verification.
    """

    name: str
    version: str
    stage: Stage
    content: str = ""
    reason: str = ""
    failed_stage: Stage | None = None
    time: float = field(default_factory=time.time)

    @classmethod
    def of(cls, version: AdapterVersion, stage: Stage) -> Self:
        """The event of a version that reached a stage."""
        return cls(version.name, version.version, stage, version.content)

    @classmethod
    def failure(cls, name: str, version: str, error: StageError, content: str = "") -> Self:
        """The event of a version that did not reach a stage."""
        failed_stage = None if isinstance(error, ElsewhereError) else error.stage
        return cls(name, version, Stage.FAILED, content, error.reason, failed_stage)


class WatcherTooSlowError(Exception):
    """A watcher fell too far behind."""


class Events:
    """Calls `on_event` with each event, before any watcher gets it."""

    def __init__(self, on_event: Callable[[Event], None] = lambda _: None) -> None:
        self._on_event = on_event
        self._watchers: set[asyncio.Queue[Event | None]] = set()

    def emit(self, event: Event) -> None:
        """Log an event, count it and hand it to the watchers. On the event loop."""
        failed = event.failed_stage is not None
        fields = {"adapter": event.name, "version": event.version, "stage": event.stage.value}
        fields |= {name: value for name in ("content", "reason") if (value := getattr(event, name))}
        if event.failed_stage:
            fields["failed_stage"] = event.failed_stage.value
        level, message = (logging.ERROR, "adapter not served") if failed else (logging.INFO, "adapter")
        logger.log(level, message, extra={"fields": fields})
        self._on_event(event)
        for queue in list(self._watchers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._watchers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    async def watch(self) -> AsyncIterator[Event]:
        """Every event from now on. Raises WatcherTooSlowError once the reader is too far behind."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_WATCHER_BACKLOG)
        self._watchers.add(queue)
        try:
            while queue in self._watchers or not queue.empty():
                event = await queue.get()
                if event is None:
                    break
                yield event
            raise WatcherTooSlowError
        finally:
            self._watchers.discard(queue)
