"""When to look at the folder of adapters again: at once where the kernel tells, else every so often.

The kernel does not tell of changes made on another machine (NFS, object storage) or behind a link that is flipped.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from server.telemetry.logs import get_logger

logger = get_logger("adapters")


async def changes(folder: Path, poll_s: float) -> AsyncIterator[None]:
    """Something may have changed; at least every `poll_s` seconds."""
    from watchfiles import awatch

    while True:
        try:
            async for _ in awatch(
                folder, watch_filter=None, step=20, debounce=100, rust_timeout=int(poll_s * 1000), yield_on_timeout=True
            ):
                yield
        except (OSError, RuntimeError) as error:
            # Out of watches, a file system without them, or a folder that is gone for now.
            logger.warning("no notice of changes, polling", extra={"fields": {"reason": str(error)}})
        yield
        await asyncio.sleep(poll_s)
