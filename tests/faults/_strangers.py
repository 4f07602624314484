"""Strangers without a key, in a process of their own: `python -m tests.faults._strangers HOST:PORT`.

It reads lines: `open` makes the connections, answers `opened` and keeps their number up; `close` ends them and answers
`closed`. The end of its input ends it.
"""

import asyncio
import contextlib
import resource
import sys
from typing import Any

import grpc

IDLE = 5000
HALF_OPEN = 2000
SLOW = 200
# Calls that one connection carries.
_CALLS_OF_A_CHANNEL = 500
# Calls a second that are opened again where the server has ended them.
_AGAIN = 50.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = bytes.fromhex("000000040000000000")
_SETTINGS_ACK = bytes.fromhex("000000040100000000")


class Strangers:
    """Idle connections, calls that send headers alone, connections that send their first bytes slowly."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._running: list[asyncio.Task[None]] = []
        self._idle: list[asyncio.StreamWriter] = []
        self._channels: list[Any] = []
        self._turns = asyncio.Semaphore(1)

    async def open(self) -> None:
        """Returns once all have been opened."""
        for _ in range(0, IDLE, 50):
            await asyncio.gather(*(self._stay_idle() for _ in range(50)))
        self._running += [asyncio.create_task(self._dawdle(number)) for number in range(SLOW)]
        for number in range(HALF_OPEN // _CALLS_OF_A_CHANNEL):
            options = [("grpc.use_local_subchannel_pool", 1), ("strangers.number", number)]
            channel = grpc.aio.insecure_channel(self._address, options=options)
            self._channels.append(channel)
            await channel.channel_ready()
            self._running += [asyncio.create_task(self._half_open(channel)) for _ in range(_CALLS_OF_A_CHANNEL)]
        await asyncio.sleep(1)

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        for writer in self._idle:
            writer.close()
        self._running, self._channels, self._idle = [], [], []

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _stay_idle(self) -> None:
        """A whole connection of HTTP/2, without a call."""
        reader, writer = await self._connect()
        writer.write(_PREFACE + _SETTINGS)
        await reader.read(1024)
        writer.write(_SETTINGS_ACK)
        self._idle.append(writer)

    async def _dawdle(self, number: int) -> None:
        await asyncio.sleep(number / SLOW)
        while True:
            with contextlib.suppress(OSError):
                _, writer = await self._connect()
                for byte in _PREFACE:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)
                writer.close()

    async def _half_open(self, channel: Any) -> None:
        while True:
            call = channel.stream_stream("/mtlora.v1.Inference/Generate")()
            await call.code()
            async with self._turns:
                await asyncio.sleep(1 / _AGAIN)


async def _main(address: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    strangers = Strangers(address)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if line == "open":
            await strangers.open()
        else:
            await strangers.close()
        print(f"{line}{'ed' if line == 'open' else 'd'}", flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
