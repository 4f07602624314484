"""Whether a request may run now: the server's state, and how many requests are in flight."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from server.errors import RESTART_RETRY_S, RequestFailedError, resource_exhausted, unavailable


class State(Enum):
    STARTING = "the engine is not ready yet"
    SERVING = "serving"
    DRAINING = "the server is draining"
    RESTARTING = "the engine has died and is being started again"


_RETRY_AFTER_S = {State.STARTING: 5.0, State.DRAINING: 1.0, State.RESTARTING: RESTART_RETRY_S}


class Admission:
    """Admits requests while the server is serving and has room, and knows when the last one has left.

    `on_change` gets how many are in flight; `on_full` is called for every request that is refused for want of room.
    """

    def __init__(
        self,
        max_in_flight: int,
        on_change: Callable[[int], None] = lambda _: None,
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        self.state = State.STARTING
        self._max_in_flight = max_in_flight
        self._on_change = on_change
        self._on_full = on_full
        self._running: set[asyncio.Task[Any]] = set()
        self._aborting = False
        self._idle = asyncio.Event()
        self._idle.set()

    def check_serving(self) -> None:
        """Raise UNAVAILABLE unless the server is serving."""
        if self.state is not State.SERVING:
            raise unavailable(self.state.value, _RETRY_AFTER_S[self.state])

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place for the current task, one request. Raises UNAVAILABLE or RESOURCE_EXHAUSTED."""
        self.check_serving()
        if len(self._running) >= self._max_in_flight:
            self._on_full()
            raise resource_exhausted(f"{self._max_in_flight} requests are in flight, the most this server admits", 1.0)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._changed()
        try:
            yield
        except asyncio.CancelledError:
            if self._aborting:
                raise _out_of_time() from None
            raise
        finally:
            self._running.discard(task)
            self._changed()

    async def drained(self, timeout: float) -> bool:
        """Wait until no request is in flight; False where `timeout` seconds were not enough."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def abort_running(self) -> None:
        """End every request in flight with UNAVAILABLE."""
        self._aborting = True
        for task in self._running:
            task.cancel()

    def _changed(self) -> None:
        self._on_change(len(self._running))
        if self._running:
            self._idle.clear()
        else:
            self._idle.set()


def _out_of_time() -> RequestFailedError:
    return unavailable("the server stopped before the answer was complete", 1.0)
