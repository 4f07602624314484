"""The methods that both clients share.

A method is a generator: it yields calls and turns replies into a result. Each client makes the calls in its own way,
blocking or awaiting.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

if TYPE_CHECKING:
    from mtlora.client.async_client import AsyncClient
    from mtlora.client.client import Client

P = ParamSpec("P")
T = TypeVar("T")
# Yields (rpc, request, timeout in seconds), receives the reply, returns the method's result. The reply of a streaming
# RPC is (first message, iterator over the others).
Steps = Generator[tuple[Any, Any, float | None], Any, T]
# (rpc, request, timeout in seconds, conversion of each message)
Stream = tuple[Any, Any, float | None, Callable[[Any], T]]


class Method(Generic[P, T]):
    """A method of both clients: Client returns the result, AsyncClient an awaitable."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__
        self.__wrapped__ = steps

    @overload
    def __get__(self, client: "Client", owner: Any = None) -> Callable[P, T]: ...

    @overload
    def __get__(self, client: "AsyncClient", owner: Any = None) -> Callable[P, Awaitable[T]]: ...

    @overload
    def __get__(self, client: None, owner: Any = None) -> Self: ...

    def __get__(self, client: Any, owner: Any = None) -> Any:
        if client is None:
            return self

        def method(*arguments: P.args, **named: P.kwargs) -> Any:
            return client._run(self._steps(client, *arguments, **named))

        return method


class Streaming(Generic[P, T]):
    """Like `Method`, for a method that returns an iterator. Closing the iterator cancels the call."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Stream[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__
        self.__wrapped__ = describe

    @overload
    def __get__(self, client: "Client", owner: Any = None) -> Callable[P, Generator[T, None, None]]: ...

    @overload
    def __get__(self, client: "AsyncClient", owner: Any = None) -> Callable[P, AsyncGenerator[T, None]]: ...

    @overload
    def __get__(self, client: None, owner: Any = None) -> Self: ...

    def __get__(self, client: Any, owner: Any = None) -> Any:
        if client is None:
            return self

        def method(*arguments: P.args, **named: P.kwargs) -> Any:
            return client._messages(*self._describe(client, *arguments, **named))

        return method
