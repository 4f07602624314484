"""Yields long lists in pieces, so that the event loop runs in between."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

# Seconds of work after which the event loop runs again.
_PIECE_S = 0.002
_Item = TypeVar("_Item")


async def in_pieces(items: Iterable[_Item]) -> AsyncIterator[_Item]:
    """The items, with the event loop running between pieces of two milliseconds."""
    until = time.perf_counter() + _PIECE_S
    for item in items:
        yield item
        if time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _PIECE_S
