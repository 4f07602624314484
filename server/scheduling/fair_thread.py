"""Runs the work of many tenants in one or a few threads, fairly."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.scheduling.fair_queue import FairQueue
from server.tenants import Tenant

Result = TypeVar("Result")


class FairThread:
    """Runs one piece of work at a time in each of `threads`; the order is fair, as for turns in the engine.

    All methods run on the event loop.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        # The number of threads limits the cores that this work uses.
        self._executor = ThreadPoolExecutor(threads, name)
        self._queue: FairQueue[tuple[str, int], asyncio.Future[None]] = FairQueue()
        self._free = threads

    async def run(self, tenant: Tenant, cost: float | None, work: Callable[[], Result]) -> Result:
        """Wait for the tenant's turn, then for the work's result.

        `cost` is in any unit, the same for all work; None means the measured seconds, if the cost is not known before.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        line = tenant.id, tenant.priority.rank
        self._queue.push(line, turn, weight=tenant.weight, rank=tenant.priority.rank)
        self._next()
        try:
            await turn
            began = time.monotonic()
            self._queue.charge(line, cost or 0.0)
            try:
                return await loop.run_in_executor(self._executor, work)
            finally:
                if cost is None:
                    self._queue.charge(line, time.monotonic() - began)
        finally:
            if turn.cancelled():
                self._queue.remove(line, turn)
            else:
                self._free += 1
                self._next()

    def _next(self) -> None:
        while self._free and (entry := self._queue.pop()):
            _, turn = entry
            # The work of a cancelled caller stays in the line until it is next; skip it then.
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
