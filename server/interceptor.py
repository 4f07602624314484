"""Around every RPC of the contract: a request id, one log line, one count, and a status for whatever was raised."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from server.call import Call, set_current_call
from server.errors import DETAILS_KEY, RequestFailedError, from_exception
from server.logs import get_logger
from server.metrics import Metrics
from server.tracing import Tracer

logger = get_logger("request")

REQUEST_ID_KEY = "x-request-id"
_SERVICE_PREFIX = "/mtlora.v1."
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}")

# The client's clock for a deadline starts before this side's: its cancel can come in a moment before the deadline does.
_DEADLINE_SLACK_S = 0.1


class CallInterceptor(grpc.aio.ServerInterceptor):
    """`task_label` maps any task id to one that is fit to be a metric's label."""

    def __init__(self, metrics: Metrics, task_label: Callable[[str], str], tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._metrics = metrics
        self._task_label = task_label

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap the handlers of this contract; health and reflection stay as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_SERVICE_PREFIX):
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        request_id = _request_id(handler_call_details.invocation_metadata)

        async def unary(request: Any, context: Any) -> Any:
            async with self._call(request, context, method, request_id):
                return await handler.unary_unary(request, context)

        # A coroutine that writes, not a generator: cancellation then lands in here, and closes the handler's generator.
        async def stream(request: Any, context: Any) -> None:
            async with (
                self._call(request, context, method, request_id),
                aclosing(handler.unary_stream(request, context)) as messages,
            ):
                async for message in messages:
                    await context.write(message)

        make, behavior = (
            (grpc.unary_stream_rpc_method_handler, stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, unary)
        )
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _call(self, request: Any, context: Any, method: str, request_id: str) -> AsyncIterator[None]:
        task_id = getattr(request, "task_id", None)
        call = Call(request_id, method, task="" if task_id is None else self._task_label(task_id))
        if self._tracer:
            call.trace = self._tracer.begin(method, request_id, context.invocation_metadata())
        set_current_call(call)
        trailer = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(trailer)
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            left = context.time_remaining()
            expired = left is not None and left <= _DEADLINE_SLACK_S
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            failure = from_exception(error)
            code = failure.code
            if code is grpc.StatusCode.INTERNAL and not isinstance(error, RequestFailedError):
                logger.error("internal error", exc_info=error, extra={"fields": {"request_id": request_id}})
            await context.abort(code, failure.message, (*trailer, (DETAILS_KEY, failure.status_details())))
        finally:
            self._record(call, code)

    def _record(self, call: Call, code: grpc.StatusCode) -> None:
        self._metrics.record_request(call, code.name)
        if call.trace:
            call.trace.end(code.name, call)
        fields = {
            "request_id": call.request_id,
            "method": call.method,
            "task": call.task,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
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
