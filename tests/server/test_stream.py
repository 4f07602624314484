"""A stream's buffer between the engine and a slow reader."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import AsyncClient, make_request
from server.errors import RequestFailedError
from server.job import Delta, TokenLogprob, TokenLogprobs
from server.rpc.stream import unhurried
from tests.server.fakes import Service
from tests.waiting import eventually

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


@pytest.mark.slow
async def test_a_slow_reader_holds_up_itself_alone_and_is_ended() -> None:
    service = Service(turns=1, slow_reader_s=1.0)
    service.engine.deltas = [Delta("x" * 200_000, 1) for _ in range(20)] + [Delta("", 1, finish_reason="stop")]
    async with service.running(), AsyncClient(service.address) as quick:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(make_request("one", "x"))
            await call.read()
            # The only slot is free again, although nobody reads the stream.
            assert (await asyncio.wait_for(quick.generate("one", "y"), 5)).text
            counted = {"method": "GenerateStream", "task": "one", "status": "RESOURCE_EXHAUSTED"}
            await eventually(lambda: service.value("mtlora_requests_total", **counted) == 1)
            await eventually(lambda: service.value("mtlora_requests_in_flight") == 0)
            # The client gets the status when it reads on.
            with pytest.raises(grpc.aio.AioRpcError):
                await _read_on(call)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "taken for 1 s" in await call.details()


async def _read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
