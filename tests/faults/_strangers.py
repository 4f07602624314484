"""Strangers without a key, in a process of their own: `python -m tests.faults._strangers HOST:PORT`.

It reads lines: `open` makes the connections and keeps their number up, `count` counts those that the server holds now,
`close` ends them. It answers each with a line: how many idle connections, half-open calls and slow connections are
open. The end of its input ends it.
"""

import asyncio
import contextlib
import resource
import sys
import time
from functools import partial

from tests import http2

IDLE = 5000
HALF_OPEN = 2000
SLOW = 200
# The server lets a peer hold so many calls without a key, and fewer here; on loopback, every address is a peer.
_PEERS = [f"127.0.0.{number}" for number in range(2, 10)]
# Needs no key, so the server waits for its message.
_HALF_OPEN = "/grpc.health.v1.Health/Check"
# Reopen a call that the server ended, but wait if it ended at once, because it was refused.
_REFUSED_S, _AGAIN_S = 1.0, 5.0
_OPEN_TIMEOUT_S = 60.0


class Connection(asyncio.Protocol):
    """A connection of HTTP/2 with a number of calls that send their headers alone."""

    def __init__(self, calls: int = 0) -> None:
        self.is_open = False
        # When the open calls began, by stream.
        self.calls: dict[int, float] = {}
        self.ready = asyncio.get_running_loop().create_future()
        self.wanted, self._next, self._rest = calls, 1, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b""))

    def data_received(self, data: bytes) -> None:
        frames, self._rest = http2.parse(self._rest + data)
        for kind, flags, stream, payload in frames:
            if kind in (http2.SETTINGS, http2.PING) and not flags & http2.ACK:
                self.transport.write(http2.frame(kind, http2.ACK, 0, payload if kind == http2.PING else b""))
                if not self.ready.done():
                    self.ready.set_result(None)
                    self.is_open = True
                    for _ in range(self.wanted):
                        self._call()
            elif kind == http2.RST_STREAM or (kind in (http2.DATA, http2.HEADERS) and flags & http2.END_STREAM):
                self._ended(stream)

    def _call(self) -> None:
        if self.is_open:
            self.calls[self._next] = time.monotonic()
            self.transport.write(http2.call_headers(self._next, _HALF_OPEN))
            self._next += 2

    def _ended(self, stream: int) -> None:
        began = self.calls.pop(stream, None)
        if began is not None:
            refused = time.monotonic() - began < _REFUSED_S
            asyncio.get_running_loop().call_later(_AGAIN_S if refused else 0, self._call)

    def connection_lost(self, _: Exception | None) -> None:
        self.is_open = False
        self.calls.clear()
        if not self.ready.done():
            self.ready.set_result(None)


class Strangers:
    """Idle connections, calls that send headers alone, connections that send their first bytes slowly."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._connections: list[Connection] = []
        self._running: list[asyncio.Task[None]] = []
        self._slow = 0

    async def open(self) -> None:
        """Returns once all have been opened."""
        async with asyncio.timeout(_OPEN_TIMEOUT_S):
            for _ in range(0, IDLE, 50):
                await asyncio.gather(*(self._connect() for _ in range(50)))
            self._running += [asyncio.create_task(self._dawdle(number)) for number in range(SLOW)]
            await asyncio.gather(*(self._connect(HALF_OPEN // len(_PEERS), peer) for peer in _PEERS))
        # Start slow connections one after the other.
        await asyncio.sleep(1.5)

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for connection in self._connections:
            connection.transport.close()
        self._running, self._connections = [], []
        # The server's work for it belongs to no turn.
        await asyncio.sleep(1.5)

    def count(self) -> tuple[int, int, int]:
        """Idle connections, half-open calls and slow connections that are open."""
        idle = sum(each.is_open for each in self._connections if not each.wanted)
        return idle, sum(len(each.calls) for each in self._connections), self._slow

    async def _connect(self, calls: int = 0, source: str | None = None) -> None:
        _, connection = await asyncio.get_running_loop().create_connection(
            partial(Connection, calls), self._host, self._port, local_addr=(source, 0) if source else None
        )
        self._connections.append(connection)
        await connection.ready

    async def _dawdle(self, number: int) -> None:
        await asyncio.sleep(number / SLOW)
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(self._host, self._port)
                self._slow += 1
                try:
                    for byte in http2.PREFACE:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(1)
                finally:
                    self._slow -= 1
                    writer.close()


async def _main(address: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    strangers = Strangers(address)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if line == "open":
            await strangers.open()
        elif line == "close":
            await strangers.close()
        print(*strangers.count(), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
