"""Handles every RPC of the contracts: request id, tenant, log line, metrics, and a status for every exception.

A call is authenticated by its headers, before it is counted and its message is read, so a stranger's call ends at once.
The two probes of the Open Inference Protocol need no key; health and reflection pass unchanged.

Usage and audit lines are written before a call's status is sent.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from server.accounting import AUDITED, AuditLog, Usage
from server.call import Call, current_call
from server.errors import (
    DETAILS_KEY,
    RequestFailedError,
    Violation,
    invalid_argument,
    late_message,
    resource_exhausted,
    slow_reader,
)
from server.rpc.anonymous import AnonymousCalls, end_of_messages
from server.rpc.failures import failure_of
from server.rpc.wrapping import WrappingInterceptor, reading_handler
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracer
from server.tenants import Tenant

REQUEST_ID_KEY = "x-request-id"
_OPEN = {"/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"}
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}")

# Open calls that a tenant may have in addition to those that admission allows.
_MESSAGES_UNDER_WAY = 512


# (metadata, function that returns the auth context) -> tenant; raises RequestFailedError.
Authenticate = Callable[[Any, Any], Awaitable[Tenant]]
# Counts one request of a tenant against its rate; raises RequestFailedError.
CountRequest = Callable[[Tenant], None]


class CallInterceptor(WrappingInterceptor):
    """Wraps every call; limits seconds without its message or without a reader, and a tenant's open calls."""

    prefixes = ("/mtlora.v1.", "/inference.")

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        authenticate: Authenticate,
        count_request: CountRequest,
        anonymous: AnonymousCalls,
        tracer: Tracer | None = None,
        *,
        usage: Usage,
        audit: AuditLog,
    ) -> None:
        super().__init__()
        self._metrics = metrics
        self._authenticate = authenticate
        self._count_request = count_request
        self._anonymous = anonymous
        self._tracer = tracer
        self._usage = usage
        self._audit = audit
        self._request_timeout_s = settings.request_timeout_s
        self._slow_reader_s = settings.slow_reader_s
        # Twice the limit of admission, so that the fair queue chooses which request to refuse.
        self._max_open = 2 * settings.in_flight_limit + _MESSAGES_UNDER_WAY
        self._open: dict[str, int] = {}

    def wrap(self, rpc: str, handler: Any) -> Any:
        """A handler that answers as `handler` does, with what every call gets around it."""

        async def unary(_: Any, context: Any) -> Any:
            return await self._answer(rpc, context, handler.unary_unary)

        # Use a coroutine, not a generator, so that a cancellation reaches it and it closes the handler's generator.
        async def stream(_: Any, context: Any) -> None:
            await self._answer(rpc, context, write_all)

        def answers(request: Any, context: Any) -> Any:
            if handler.request_streaming:
                return handler.stream_stream(self._messages(request, context), context)
            return handler.unary_stream(request, context)

        async def write_all(request: Any, context: Any) -> None:
            async with aclosing(answers(request, context)) as messages:
                async for message in messages:
                    await self._write(context, message)

        behavior = stream if handler.response_streaming else unary
        return reading_handler(handler, behavior, _forgiving(handler.request_deserializer))

    async def _messages(self, first: Any, context: Any) -> AsyncIterator[Any]:
        """Yield the messages of a client stream; each must arrive in time."""
        message = first
        while message is not grpc.aio.EOF:
            yield message
            message = await self._next(context)

    async def _read(self, context: Any) -> Any:
        """The call's message, or its first one."""
        request = await self._next(context)
        if request is grpc.aio.EOF:
            await end_of_messages()
        return request

    async def _next(self, context: Any) -> Any:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                request = await context.read()
        except TimeoutError:
            raise late_message(f"no message came within {self._request_timeout_s:g} s of the call") from None
        if isinstance(request, _Malformed):
            raise invalid_argument([Violation("", "the bytes do not decode as this RPC's request")])
        return request

    async def _write(self, context: Any, message: Any) -> None:
        """Send one message; waits while the connection's window is full, which delays only this stream."""
        try:
            async with asyncio.timeout(self._slow_reader_s):
                await context.write(message)
        except TimeoutError:
            raise slow_reader(f"no message of the stream was taken for {self._slow_reader_s:g} s") from None

    async def _answer(self, rpc: str, context: Any, handle: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        metadata, left, is_open = context.invocation_metadata(), context.time_remaining(), rpc in _OPEN
        request_id = _request_id(metadata)
        deadline = None if left is None else time.monotonic() + left
        call = Call(request_id, rpc.rpartition("/")[2], deadline=deadline)
        # Do not trace probes: they come every few seconds.
        if self._tracer and not is_open:
            call.trace, call.genai = self._tracer.begin(rpc, request_id, metadata), self._tracer.metrics
        if rpc.startswith(AUDITED):
            call.audited = self._audit.call(rpc, request_id, context)
        current_call.set(call)
        trailer = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(trailer)
        try:
            if is_open:
                async with self._anonymous.held(context, self._request_timeout_s):
                    response = await handle(await self._read(context), context)
            else:
                call.tenant = tenant = await self._authenticate(metadata, context.auth_context)
                if tenant.has_quotas:
                    self._count_request(tenant)
                self._enter(tenant)
                try:
                    request = await self._read(context)
                    if call.audited:
                        await call.audited.received(tenant, request)
                    response = await handle(request, context)
                finally:
                    self._leave(tenant)
        except asyncio.CancelledError:
            await self._record(call, grpc.StatusCode.DEADLINE_EXCEEDED if call.expired else grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            failure = failure_of(error, request_id)
            await self._record(call, failure.code, failure.message)
            await self._abort(context, failure, trailer)
        else:
            await self._record(call, grpc.StatusCode.OK, response=response)
            return response

    def _enter(self, tenant: Tenant) -> None:
        """Count an open call of a tenant."""
        open_calls = self._open.get(tenant.id, 0)
        if open_calls >= self._max_open:
            self._metrics.record_shed(tenant.id, "open_calls")
            raise resource_exhausted(
                f"{open_calls} calls of this tenant are open, the most that one tenant may have", 1.0
            )
        self._open[tenant.id] = open_calls + 1

    def _leave(self, tenant: Tenant) -> None:
        if self._open[tenant.id] > 1:
            self._open[tenant.id] -= 1
        else:
            del self._open[tenant.id]

    async def _abort(self, context: Any, failure: RequestFailedError, trailer: tuple[tuple[str, str], ...]) -> None:
        """Send a failure's status, or give up if the reader does not read the messages before it."""
        try:
            async with asyncio.timeout(self._slow_reader_s):
                await context.abort(failure.code, failure.message, (*trailer, (DETAILS_KEY, failure.status_details())))
        except grpc.aio.AbortError:
            # `abort` always raises this.
            raise
        except (TimeoutError, grpc.aio.BaseError):
            # The reader does not take the status; after this cancellation, gRPC sends none either.
            raise asyncio.CancelledError from None

    async def _record(self, call: Call, code: grpc.StatusCode, reason: str = "", response: Any = None) -> None:
        call.settle(code, self._usage)
        if call.audited:
            await call.audited.completed(call.tenant.id, code.name, reason, response)
        call.record(code, self._metrics)
        if call.trace:
            call.trace.end(code.name, task=call.task, tenant=call.tenant.id)


def _request_id(metadata: Any) -> str:
    """The client's own id if it is valid, else a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    # A non-cryptographic generator is enough, because the id is not secret, and saves a system call.
    return f"{random.getrandbits(128):032x}"


class _Malformed:
    """Placeholder for a request whose bytes cannot be decoded."""


def _forgiving(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return `_Malformed` for undecodable bytes, because gRPC answers UNKNOWN if a deserializer raises."""

    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _Malformed()

    return attempt
