"""How late an event loop runs its tasks."""

import asyncio
from collections.abc import Callable


async def watch_loop(observe: Callable[[float], None], interval_s: float) -> None:
    """Report, every `interval_s`, by how many seconds this task woke too late; runs until cancelled.

    Each wake-up of an idle server costs a third of a millisecond where an engine has filled the processor's caches. A
    loop is late if its process gets too little processor time, waits for a disk, or runs one long computation. Every
    request is then late too, by more than its own clock shows: that clock starts when the loop reads the request.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
