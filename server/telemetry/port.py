"""The HTTP port of the metrics: one thread, however many connections callers hold open."""

import asyncio
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from io import BytesIO
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app

# Seconds to receive a request, and to send its answer.
_TIMEOUT_S = 5.0
# Most open connections; a further one closes the oldest.
_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 16 << 10
# Connections that wait to be accepted.
_BACKLOG = 1024


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer scrapes; returns the port, and a function that closes it. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # `::` is every address of either family, as it is for gRPC.
    listening = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    loop = asyncio.new_event_loop()

    def run() -> None:
        server = loop.run_until_complete(
            asyncio.start_server(_Port(registry).answer, sock=listening, backlog=_BACKLOG, limit=_MAX_REQUEST_BYTES)
        )
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    return listening.getsockname()[1], close


class _Port:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._app: Any = make_wsgi_app(registry)
        # Open connections, oldest first.
        self._open: dict[asyncio.StreamWriter, None] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        if len(self._open) >= _MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._reply(request))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, HTTPException):
            # The request is late or not HTTP, or the client is gone.
            pass
        except asyncio.CancelledError:
            # The port is closing. Do not re-raise: asyncio's streams would log the cancelled task.
            pass
        finally:
            writer.transport.abort()
            self._open.pop(writer, None)

    def _reply(self, request: bytes) -> bytes:
        """prometheus-client's answer to a request's line and headers."""
        lines = BytesIO(request)
        method, _, rest = lines.readline().decode("latin-1").partition(" ")
        path, _, query = rest.partition(" ")[0].partition("?")
        if method not in ("GET", "HEAD"):
            return _message(str(HTTPStatus.METHOD_NOT_ALLOWED.value), [("Allow", "GET, HEAD")], b"", method)
        headers = parse_headers(lines)
        said: list[Any] = []
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_ACCEPT": headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("Accept-Encoding", ""),
        }
        body = b"".join(self._app(environment, lambda *given: said.extend(given)))
        return _message(said[0], said[1], body, method)


def _message(status: str, headers: list[tuple[str, str]], body: bytes, method: str) -> bytes:
    headers = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + (b"" if method == "HEAD" else body)
