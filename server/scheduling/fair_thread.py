"""One thread for the work of many tenants."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.scheduling.fair_queue import FairQueue
from server.tenants import Tenant

Result = TypeVar("Result")


class FairThread:
    """Runs one piece of work at a time; the next one by the same fairness as turns in the engine.

    All methods run on the event loop.
    """

    def __init__(self, name: str) -> None:
        # One thread: all the work takes one core at most.
        self._executor = ThreadPoolExecutor(1, name)
        self._queue: FairQueue[tuple[str, int], asyncio.Future[None]] = FairQueue()
        self._busy = False

    async def run(self, tenant: Tenant, cost: float, work: Callable[[], Result]) -> Result:
        """Wait for the tenant's turn, then for the work's result. `cost` in any unit, the same for all."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        line = tenant.id, tenant.priority.rank
        self._queue.push(line, turn, weight=tenant.weight, rank=tenant.priority.rank)
        self._next()
        try:
            await turn
            self._queue.charge(line, cost)
            return await loop.run_in_executor(self._executor, work)
        finally:
            if turn.cancelled():
                self._queue.remove(line, turn)
            else:
                self._busy = False
                self._next()

    def _next(self) -> None:
        if not self._busy and (entry := self._queue.pop()):
            self._busy = True
            entry[1].set_result(None)
