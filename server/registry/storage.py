"""Calls to storage that may never return, such as NFS or a FUSE mount: bounded, and the server's end does not wait."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

# Most calls at a time. A hanging call keeps its thread.
_THREADS = 4

# Called by work whenever it makes progress.
Beat = Callable[[], None]


def in_thread(work: Callable[[], _T], name: str) -> "asyncio.Future[_T]":
    """Run blocking work in a daemon thread: neither the event loop nor the process waits for it when they end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)
            # Retrieve the exception, or asyncio logs it: the caller may have left.
            done.exception()

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        # The loop may have ended.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


class Storage:
    """Runs calls to one storage. `on_timeout` is called for each that made no progress for `timeout_s` seconds."""

    def __init__(self, timeout_s: float = 30.0, on_timeout: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._on_timeout = on_timeout
        self._free = asyncio.Semaphore(_THREADS)

    async def call(self, work: Callable[[Beat], _T]) -> _T:
        """Return the result of `work`. Without progress, raises TimeoutError (an OSError) and abandons the thread."""
        last = time.monotonic()

        def beat() -> None:
            nonlocal last
            last = time.monotonic()

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise self._hung() from None
        beat()
        done = in_thread(lambda: work(beat), "adapters-storage")
        done.add_done_callback(lambda _: self._free.release())
        while not done.done():
            if (left := last + self._timeout_s - time.monotonic()) <= 0:
                raise self._hung()
            await asyncio.wait({done}, timeout=left)
        return done.result()

    def _hung(self) -> TimeoutError:
        self._on_timeout()
        return TimeoutError(f"the adapters' storage did not answer within {self._timeout_s:g} s (storage_timeout_s)")
