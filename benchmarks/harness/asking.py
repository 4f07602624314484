"""The two ways to load a server: a closed loop with a fixed number in flight, and an open loop with fixed gaps."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


async def closed_loop(items: Iterable[Item], in_flight: int, ask: Callable[[Item], Awaitable[None]]) -> None:
    """Ask every item in order, `in_flight` at a time: when one ends, the next begins."""
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            await ask(item)

    await asyncio.gather(*(work() for _ in range(in_flight)))


async def open_loop(items: Iterable[Item], gaps_s: Iterable[float], ask: Callable[[Item], Awaitable[None]]) -> None:
    """Send items with fixed gaps, without waiting for answers; at the end, wait for all answers."""
    due = time.monotonic()
    async with asyncio.TaskGroup() as running:
        for item, gap_s in zip(items, gaps_s, strict=False):
            running.create_task(_awaited(ask(item)))
            due += gap_s
            await asyncio.sleep(due - time.monotonic())


async def _awaited(each: Awaitable[None]) -> None:
    await each
