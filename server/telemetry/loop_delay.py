"""How late an event loop runs what is due."""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.1


async def watch_loop(observe: Callable[[float], None]) -> None:
    """Hand on, ten times a second, by how many seconds this task was woken too late; runs until cancelled.

    A loop is late where its process has too little processor time, waits for a disk, or does something long at one go.
    Everything it does then is late by as much, and by more than its own clocks show: what has not been taken in yet
    has no clock.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        observe(max(0.0, loop.time() - due))
