"""Servers that several scenarios use in turn: starting one takes longer than most scenarios."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from tests.faults.scenario import Options


class Closes(Protocol):
    def close(self) -> None: ...


Server = TypeVar("Server", bound=Closes)


class Shared(Generic[Server]):
    """Call it to get the server. The first call starts the server, `close` stops it."""

    def __init__(self, start: Callable[[Options], Server]) -> None:
        self._start = start
        self._running: Server | None = None

    def __call__(self, options: Options) -> Server:
        if self._running is None:
            self._running = self._start(options)
        return self._running

    def close(self) -> None:
        """Stop the server if it runs: even idle it takes time from servers that are measured."""
        if self._running is not None:
            running, self._running = self._running, None
            running.close()
