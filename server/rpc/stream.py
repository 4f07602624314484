"""A stream's buffer: merges deltas until the reader takes them, up to a limit."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from server.errors import slow_reader
from server.job import Delta

MAX_UNREAD_TOKENS = 4096


@asynccontextmanager
async def unhurried(
    produce: Callable[[Callable[[Delta], None]], Awaitable[None]], max_unread: int = MAX_UNREAD_TOKENS
) -> AsyncIterator[AsyncIterator[Delta]]:
    """Yield the deltas that `produce` passes to its argument; a slow reader gets several merged into one.

    `produce` runs to its end at its own pace, so that a slow reader keeps its place in the engine no longer than a
    fast one. More than `max_unread` unread tokens end it, and the reader gets RESOURCE_EXHAUSTED.
    """
    buffer = _Buffer(max_unread)
    producer = asyncio.create_task(buffer.fill(produce))
    try:
        yield buffer.drain()
    finally:
        producer.cancel()
        await asyncio.wait([producer])
        if not producer.cancelled():
            producer.exception()


class _Buffer:
    def __init__(self, max_unread: int) -> None:
        self._max_unread = max_unread
        self._unread: Delta | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._change = asyncio.Event()

    async def fill(self, produce: Callable[[Callable[[Delta], None]], Awaitable[None]]) -> None:
        try:
            await produce(self._put)
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

    def _put(self, delta: Delta) -> None:
        self._unread = delta if self._unread is None else _join(self._unread, delta)
        if self._unread.tokens > self._max_unread:
            self._unread = None
            raise slow_reader(f"more than {self._max_unread} tokens of the stream lie unread")
        self._change.set()


def _join(first: Delta, second: Delta) -> Delta:
    return Delta(
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        finish_reason=second.finish_reason,
        reasoning=first.reasoning + second.reasoning,
        token_ids=(*first.token_ids, *second.token_ids),
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        cumulative_logprob=second.cumulative_logprob,
    )
