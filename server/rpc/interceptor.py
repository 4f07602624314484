"""Around every RPC of the contracts: request id, tenant, one log line, one count, a status for whatever was raised.

Health and reflection are open to everybody and stay as they are; so are the two probes of the Open Inference Protocol.
"""

import asyncio
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from server.call import Call, set_current_call
from server.errors import DETAILS_KEY, RequestFailedError, Violation, from_exception, invalid_argument, slow_reader
from server.telemetry.logs import get_logger
from server.telemetry.metrics import UNKNOWN_TASK, Metrics
from server.telemetry.tracing import Tracer
from server.tenants import Tenant

logger = get_logger("request")

REQUEST_ID_KEY = "x-request-id"
_SERVICE_PREFIXES = ("/mtlora.v1.", "/inference.")
_OPEN = {"/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"}
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}")

# The client's clock for a deadline starts before this side's: its cancel can come in a moment before the deadline does.
_DEADLINE_SLACK_S = 0.1


# (metadata, what gives the auth context) -> tenant; raises RequestFailedError.
Authenticate = Callable[[Any, Any], Awaitable[Tenant]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """`task_label` maps any task id to one that is fit to be a metric's label.

    A stream whose reader takes no message for `slow_reader_s` seconds is ended.
    """

    def __init__(
        self,
        metrics: Metrics,
        task_label: Callable[[str], str],
        authenticate: Authenticate | None = None,
        tracer: Tracer | None = None,
        *,
        slow_reader_s: float = 30.0,
    ) -> None:
        self._metrics = metrics
        self._task_label = task_label
        self._authenticate = authenticate
        self._tracer = tracer
        self._slow_reader_s = slow_reader_s

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap the handlers of the contracts."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_SERVICE_PREFIXES):
            return handler
        rpc = handler_call_details.method
        request_id = _request_id(handler_call_details.invocation_metadata)

        async def unary(request: Any, context: Any) -> Any:
            async with self._call(request, context, rpc, request_id):
                return await handler.unary_unary(request, context)

        # A coroutine that writes, not a generator: cancellation then lands in here, and closes the handler's generator.
        async def stream(request: Any, context: Any) -> None:
            async with (
                self._call(request, context, rpc, request_id),
                aclosing(handler.unary_stream(request, context)) as messages,
            ):
                async for message in messages:
                    await self._write(context, message)

        make, behavior = (
            (grpc.unary_stream_rpc_method_handler, stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, unary)
        )
        return make(behavior, _forgiving(handler.request_deserializer), handler.response_serializer)

    async def _write(self, context: Any, message: Any) -> None:
        """Waits while the connection has no room: what the reader does not take holds up this stream alone."""
        try:
            async with asyncio.timeout(self._slow_reader_s):
                await context.write(message)
        except TimeoutError:
            raise slow_reader(f"no message of the stream was taken for {self._slow_reader_s:g} s") from None

    @asynccontextmanager
    async def _call(self, request: Any, context: Any, rpc: str, request_id: str) -> AsyncIterator[None]:
        left, is_open = context.time_remaining(), rpc in _OPEN
        deadline = None if left is None else time.monotonic() + left
        call = Call(request_id, rpc.rpartition("/")[2], task="", deadline=deadline)
        # Not of probes, which come every few seconds.
        if self._tracer and not is_open:
            call.trace = self._tracer.begin(rpc, request_id, context.invocation_metadata())
        set_current_call(call)
        trailer = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(trailer)
        try:
            if self._authenticate is not None and not is_open:
                call.tenant = await self._authenticate(context.invocation_metadata(), context.auth_context)
            if isinstance(request, _Malformed):
                raise invalid_argument([Violation("", "found bytes that are no such message")])
            call.task = self._label(request, call.tenant)
            yield
        except asyncio.CancelledError:
            left = context.time_remaining()
            expired = left is not None and left <= _DEADLINE_SLACK_S
            self._record(call, grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            failure = from_exception(error)
            if failure.code is grpc.StatusCode.INTERNAL and not isinstance(error, RequestFailedError):
                # Where, not what: an exception's own words may hold what a tenant sent.
                fields = {"request_id": request_id, "error": type(error).__name__, "where": _where(error)}
                logger.error("internal error", extra={"fields": fields})
            self._record(call, failure.code)
            await self._abort(context, failure, trailer)
        else:
            self._record(call, grpc.StatusCode.OK)

    async def _abort(self, context: Any, failure: RequestFailedError, trailer: tuple[tuple[str, str], ...]) -> None:
        """Send a failure's status. It queues behind messages that a reader does not take, and is left there then."""
        try:
            async with asyncio.timeout(self._slow_reader_s):
                await context.abort(failure.code, failure.message, (*trailer, (DETAILS_KEY, failure.status_details())))
        except grpc.aio.AbortError:
            # The way out of every abort.
            raise
        except (TimeoutError, grpc.aio.BaseError):
            # Nobody is there to take it. The one ending after which gRPC sends no status of its own.
            raise asyncio.CancelledError from None

    def _label(self, request: Any, tenant: Tenant) -> str:
        for name in ("task_id", "model_name", "name"):
            task_id = getattr(request, name, None)
            if task_id is not None:
                return self._task_label(task_id) if tenant.allows(task_id) else UNKNOWN_TASK
        return ""

    def _record(self, call: Call, code: grpc.StatusCode) -> None:
        self._metrics.record_request(call, code.name)
        known: dict[str, Any] = {
            "tenant": call.tenant.id,
            "task": call.task,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
        }
        if call.trace:
            call.trace.end(code.name, **known)
        fields = {
            "request_id": call.request_id,
            "method": call.method,
            **known,
            "status": code.name,
            "ms": round((time.monotonic() - call.received) * 1e3, 1),
        }
        logger.info("request", extra={"fields": fields})


def _request_id(metadata: Any) -> str:
    """The client's own id where it is sane, else a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


class _Malformed:
    """Stands for a request that is no message of its type."""


def _forgiving(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers UNKNOWN where a deserializer raises; this leaves the status to the call."""

    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _Malformed()

    return attempt


def _where(error: BaseException) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
