"""The two ways to ask a server: a closed loop, with so many requests at a time, and an open one, at given times."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


async def closed_loop(items: Iterable[Item], in_flight: int, ask: Callable[[Item], Awaitable[None]]) -> None:
    """Ask every item in order, `in_flight` at a time: the next begins as soon as one has ended."""
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            await ask(item)

    await asyncio.gather(*(work() for _ in range(in_flight)))


async def open_loop(items: Iterable[Item], gaps_s: Iterable[float], ask: Callable[[Item], Awaitable[None]]) -> None:
    """Ask items in order, a gap of so many seconds apart, however long each takes; wait for all of them."""
    due = time.monotonic()
    async with asyncio.TaskGroup() as running:
        for item, gap_s in zip(items, gaps_s, strict=False):
            running.create_task(_awaited(ask(item)))
            due += gap_s
            await asyncio.sleep(due - time.monotonic())


async def _awaited(each: Awaitable[None]) -> None:
    await each
