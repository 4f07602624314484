"""Interceptors that put a behavior of their own around the handlers of services."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc


class WrappingInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of methods whose path begins with one of `prefixes`; others pass unchanged."""

    prefixes: tuple[str, ...]

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """gRPC asks for the handler of every call; each method's is wrapped once."""
        rpc = handler_call_details.method
        if rpc not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None or not rpc.startswith(self.prefixes):
                return handler
            self._wrapped[rpc] = self.wrap(rpc, handler)
        return self._wrapped[rpc]

    def wrap(self, rpc: str, handler: Any) -> Any:
        """The handler that answers instead of `handler`."""
        raise NotImplementedError


def reading_handler(
    handler: Any, behavior: Callable[[Any, Any], Awaitable[Any]], deserialize: Callable[[bytes], Any]
) -> Any:
    """A handler whose `behavior` reads the call's message itself.

    A unary call becomes one with a stream of messages: for a unary handler, gRPC waits without limit for the message
    before it calls the handler.
    """
    stream = handler.response_streaming
    make = grpc.stream_stream_rpc_method_handler if stream else grpc.stream_unary_rpc_method_handler
    return make(behavior, deserialize, handler.response_serializer)
