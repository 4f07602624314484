"""Measures how late an event loop runs its tasks."""

import asyncio
from collections.abc import Callable


async def watch_loop(observe: Callable[[float], None], interval_s: float) -> None:
    """Report, every `interval_s`, by how many seconds this task woke too late; runs until cancelled.

    Each wake-up of an idle server costs a third of a millisecond if an engine has filled the processor's caches, so the
    interval is long. A loop is late if its process gets too little processor time, waits for a disk, or runs a long
    computation. Requests are then late too, but their own times do not show all of it, because they start when the loop
    reads the request.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
