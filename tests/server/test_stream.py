"""A stream's buffer between the engine and a slow reader."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.errors import RequestFailedError
from server.job import Delta, TokenLogprob, TokenLogprobs
from server.rpc.stream import unhurried

LOGPROBS = TokenLogprobs(TokenLogprob(1, "x", -0.5), ())


Produce = Callable[[Callable[[Delta], None]], Awaitable[None]]


def source(deltas: list[Delta], ended: list[str], error: Exception | None = None) -> Produce:
    async def produce(emit: Callable[[Delta], None]) -> None:
        try:
            for delta in deltas:
                emit(delta)
                await asyncio.sleep(0)
            if error:
                raise error
        finally:
            ended.append("ended")

    return produce


def some(count: int) -> list[Delta]:
    deltas = [Delta(str(i), 1, (LOGPROBS,)) for i in range(count)]
    return [*deltas, Delta("", 1, finish_reason="stop")]


async def test_a_fast_reader_gets_every_delta() -> None:
    ended: list[str] = []
    async with unhurried(source(some(3), ended)) as deltas:
        assert [delta.text async for delta in deltas] == ["0", "1", "2", ""]
    assert ended == ["ended"]


async def test_a_slow_reader_gets_several_deltas_as_one_and_does_not_delay_the_producer() -> None:
    ended: list[str] = []
    async with unhurried(source(some(5), ended), max_unread=5) as deltas:
        first = await anext(deltas)
        await asyncio.sleep(0.05)
        assert ended == ["ended"]
        (rest,) = [delta async for delta in deltas]
    assert (first.text, rest.text, rest.tokens, rest.finish_reason) == ("0", "1234", 5, "stop")
    assert len(rest.logprobs) == 4


async def test_too_many_unread_tokens_end_the_stream() -> None:
    ended: list[str] = []
    async with unhurried(source(some(4), ended), max_unread=3) as deltas:
        await anext(deltas)
        await asyncio.sleep(0.05)
        with pytest.raises(RequestFailedError, match="more than 3 tokens"):
            await anext(deltas)
    assert ended == ["ended"]


async def test_a_failure_follows_the_deltas_before_it() -> None:
    async with unhurried(source([Delta("a", 1)], [], ValueError("no"))) as deltas:
        await asyncio.sleep(0.05)
        assert (await anext(deltas)).text == "a"
        with pytest.raises(ValueError, match="no"):
            await anext(deltas)


async def test_leaving_ends_the_producer() -> None:
    ended: list[str] = []
    async with unhurried(source([Delta("a", 1)] * 1000, ended)) as deltas:
        await anext(deltas)
    assert ended == ["ended"]
