"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import grpc
from mtlora_pb.v1 import adapters_pb2

from mtlora.client.access import OPEN, Access
from mtlora.client.calls import OPTIONS, RETRY, UPLOAD_TIMEOUT_S, Calls, same, streams
from mtlora.client.client import Client
from mtlora.client.errors import ServerError, server_errors
from mtlora.client.method import Steps, T
from mtlora.client.placed import Placed
from mtlora.client.placement import Placement
from mtlora.client.retry import Attempts, Retry


class AsyncClient(Calls):
    """`Client` for asyncio, without health checks; an asynchronous context manager.

    placement: chooses the server of each Inference call; None: servers take turns.
    """

    def __init__(
        self,
        address: str,
        access: Access = OPEN,
        retry: Retry | None = RETRY,
        placement: Placement | None = None,
    ) -> None:
        super().__init__(grpc.aio, address, access, retry)
        self._place = address, access
        self._placed = Placed(address, access, OPTIONS, placement) if placement else None
        if self._placed:
            self._stub = self._placed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._placed:
            await self._placed.close()
        await self._channel.close()

    async def watch_adapters(self, adapter: str = "") -> AsyncGenerator[adapters_pb2.AdapterEvent, None]:
        """Like `Client.watch_adapters`: await this, then iterate over its result."""
        call = self._watch(adapter)
        with server_errors():
            await call.wait_for_connection()
        return _read(call)

    async def upload_adapter(self, folder: Path | str, adapter: str, *, timeout: float = UPLOAD_TIMEOUT_S) -> str:
        """Like `Client.upload_adapter`.

        Runs blocking calls in a thread: if a server refuses an upload while grpc.aio writes, half of the refusals are
        lost (https://github.com/grpc/grpc/issues/36066).
        """
        # On cancellation the channel closes, which also ends the thread's call.
        with Client(*self._place, self._retry) as client:
            return await asyncio.to_thread(client.upload_adapter, folder, adapter, timeout=timeout)

    async def _run(self, steps: Steps[T]) -> T:
        reply: Any = None
        while True:
            try:
                rpc, request, timeout = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if streams(rpc):
                messages = self._messages(rpc, request, timeout, same)
                reply = await anext(messages), messages
            else:
                reply = await self._reply(rpc, request, timeout)

    async def _reply(self, rpc: Any, request: Any, timeout: float | None) -> Any:
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                with server_errors():
                    return await rpc(request, timeout=attempts.left_s, metadata=self._metadata)
            except ServerError as error:
                await asyncio.sleep(attempts.after(error))

    async def _messages(
        self, rpc: Any, request: Any, timeout: float | None, convert: Callable[[Any], T]
    ) -> AsyncGenerator[T, None]:
        attempts, begun = Attempts(self._retry, timeout), False
        while True:
            call = rpc(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                async with aclosing(_read(call)) as messages:
                    async for message in messages:
                        begun = True
                        yield convert(message)
                return
            except ServerError as error:
                if begun:
                    raise
                await asyncio.sleep(attempts.after(error))


async def _read(call: Any) -> AsyncGenerator[Any, None]:
    try:
        with server_errors():
            async for message in call:
                yield message
    finally:
        call.cancel()
