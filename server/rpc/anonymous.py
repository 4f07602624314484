"""Limits number and duration of calls that need no key, such as health and reflection.

A peer is an IPv4 address without port, or the first 64 bits of an IPv6 address, because one machine may use all
addresses with this prefix.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from ipaddress import IPv6Network
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc

from server.errors import RequestFailedError, Violation, invalid_argument, resource_exhausted, unavailable
from server.rpc.wrapping import WrappingInterceptor, reading_handler
from server.settings import Settings

_REFLECTION_S = 60.0


class AnonymousCalls:
    """Counts open calls by peer; all peers together may hold as many streams as the server allows connections."""

    def __init__(self, settings: Settings) -> None:
        self._most_of_a_peer = settings.max_anonymous_calls
        self._most_streams = settings.max_connections
        self._open: Counter[str] = Counter()
        self._streams = 0

    @asynccontextmanager
    async def held(self, context: Any, seconds: float | None, *, stream: bool = False) -> AsyncIterator[None]:
        """Count a call inside. Raises RESOURCE_EXHAUSTED above the limits, UNAVAILABLE after `seconds`."""
        peer = peer_of(context.peer())
        if self._open[peer] >= self._most_of_a_peer:
            raise resource_exhausted(f"{self._open[peer]} calls without a tenant are open from {peer}", 1.0)
        if stream and self._streams >= self._most_streams:
            raise resource_exhausted(f"{self._streams} streams without a tenant are open", 1.0)
        self._open[peer] += 1
        self._streams += stream
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise unavailable(f"a call without a tenant is ended after {seconds:g} s", 0.0) from None
        finally:
            self._streams -= stream
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


class AnonymousInterceptor(WrappingInterceptor):
    """Limits calls of gRPC's own services, health and reflection."""

    prefixes = ("/grpc.",)

    def __init__(self, calls: AnonymousCalls, settings: Settings) -> None:
        super().__init__()
        self._calls = calls
        self._request_timeout_s = settings.request_timeout_s

    def wrap(self, rpc: str, handler: Any) -> Any:
        """A handler that answers as `handler` does, within the limits."""
        calls = self._calls

        async def unary(_: Any, context: Any) -> Any:
            async with _ended_by_status(context), calls.held(context, self._request_timeout_s):
                return await handler.unary_unary(await _read(context), context)

        async def watch(_: Any, context: Any) -> None:
            async with _ended_by_status(context):
                async with calls.held(context, self._request_timeout_s):
                    request = await _read(context)
                # Do not end a watch: the client would take that for an unhealthy server.
                async with calls.held(context, None, stream=True):
                    await handler.unary_stream(request, context)

        async def converse(requests: Any, context: Any) -> None:
            async with (
                _ended_by_status(context),
                calls.held(context, _REFLECTION_S, stream=True),
                aclosing(handler.stream_stream(requests, context)) as answers,
            ):
                async for answer in answers:
                    await context.write(answer)

        stream = converse if handler.request_streaming else watch
        return reading_handler(handler, stream if handler.response_streaming else unary, handler.request_deserializer)


@asynccontextmanager
async def _ended_by_status(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except RequestFailedError as failure:
        await context.abort(failure.code, failure.message)


async def _read(context: Any) -> Any:
    message = await context.read()
    return await end_of_messages() if message is grpc.aio.EOF else message


async def end_of_messages() -> NoReturn:
    """End a call that has sent no message with INVALID_ARGUMENT."""
    # A cancelled call looks the same: let its cancellation arrive first.
    await asyncio.sleep(0.01)
    raise invalid_argument([Violation("", "found no message")])


def peer_of(name: str) -> str:
    """The peer in gRPC's name of a connection, such as `ipv4:127.0.0.1:50051` or `ipv6:%5B::1%5D:50051`."""
    kind, _, rest = unquote(name).partition(":")
    address = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    return str(IPv6Network((address, 64), strict=False)) if kind == "ipv6" else address
