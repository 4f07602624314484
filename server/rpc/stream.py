"""Between the engine and one reader: what the reader has not taken yet, in one piece, up to a limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from server.errors import slow_reader
from server.job import Delta

MAX_UNREAD_TOKENS = 4096


@asynccontextmanager
async def unhurried(
    source: AsyncIterator[Delta], max_unread: int = MAX_UNREAD_TOKENS
) -> AsyncIterator[AsyncIterator[Delta]]:
    """`source`'s deltas for a reader that may lag: what gathers meanwhile comes to it as one delta.

    The source runs to its end at its own pace, so that a slow reader keeps its place in the engine no longer than a
    fast one. Ends in RESOURCE_EXHAUSTED where more than `max_unread` tokens lie unread.
    """
    buffer = _Buffer(max_unread)
    pump = asyncio.create_task(buffer.fill(source))
    try:
        yield buffer.drain()
    finally:
        pump.cancel()
        await asyncio.wait([pump])
        if not pump.cancelled():
            pump.exception()


class _Buffer:
    def __init__(self, max_unread: int) -> None:
        self._max_unread = max_unread
        self._unread: Delta | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._change = asyncio.Event()

    async def fill(self, source: AsyncIterator[Delta]) -> None:
        try:
            async with aclosing(source) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    self._unread = delta if self._unread is None else _join(self._unread, delta)
                    if self._unread.tokens > self._max_unread:
                        self._unread = None
                        raise slow_reader(f"more than {self._max_unread} tokens of the stream lie unread")
                    self._change.set()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._change.set()

    async def drain(self) -> AsyncIterator[Delta]:
        while True:
            if self._unread is not None:
                delta, self._unread = self._unread, None
                yield delta
            elif self._error is not None:
                raise self._error
            elif self._ended:
                return
            else:
                await self._change.wait()
                self._change.clear()


def _join(first: Delta, second: Delta) -> Delta:
    return Delta(
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        finish_reason=second.finish_reason,
        scheduled_at=first.scheduled_at or second.scheduled_at,
        reasoning=first.reasoning + second.reasoning,
    )
