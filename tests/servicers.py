"""gRPC servers that hold a test's servicer."""

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

# A generated `add_..._to_server`.
Add = Callable[[Any, Any], None]


@contextmanager
def serving(servicer: Any, *adds: Add, threads: int = 16) -> Iterator[tuple[str, grpc.Server]]:
    """(address, server) of a servicer whose calls run in threads."""
    server = grpc.server(ThreadPoolExecutor(threads))
    for add in adds:
        add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield address, server
    finally:
        server.stop(0).wait()


@asynccontextmanager
async def serving_here(servicer: Any, add: Add) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    """(address, server) of a servicer whose calls run in this event loop."""
    server = grpc.aio.server()
    add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address, server
    finally:
        await server.stop(0)
