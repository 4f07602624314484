"""Replaces an asynchronous stub of the Inference service: sends each call to the server that a placement chooses.

Every server has a channel of its own. Calls skip a server whose channel is not connected, for example because it
stopped; the client's `Retry` repeats a failed call elsewhere.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client.access import Access
from mtlora.client.placement import Keys, Placement, Rendezvous, resolve

# Wait this long for the first connections: else all early calls would go to the first connected server.
_CONNECT_S = 2.0
_LIST_TIMEOUT_S = 10.0


@dataclass(eq=False)
class _Server:
    channel: Any
    stub: Any
    in_flight: int = 0

    @property
    def ready(self) -> bool:
        """Whether the channel is connected; if not, this starts connecting."""
        return bool(self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY)


class Placed:
    """Has a callable for each RPC, like a stub. All methods run on the event loop.

    Raises OSError for a name that cannot be resolved.
    """

    def __init__(self, address: str, access: Access, options: list[tuple[str, Any]], by: Placement) -> None:
        if access.ca and not access.server_name and not address.startswith(("ipv4:", "ipv6:")):
            # Connect to addresses, but expect the name in the certificates.
            access = replace(access, server_name=address.rpartition("/")[2].rpartition(":")[0])
        self._address, self._access, self._options, self._by = address, access, options, by
        self._keys = Keys(by.learn_s)
        self._servers: dict[str, _Server] = {}
        self._retired: list[_Server] = []
        self._resolved_at = time.monotonic()
        self._connected: asyncio.Future[Any] | None = None
        self._learning = asyncio.Lock()
        self._use(resolve(address))

    def __getattr__(self, rpc: str) -> Callable[..., Any]:
        return partial(_Messages, self, rpc) if rpc.endswith("Stream") else partial(self._reply, rpc)

    async def close(self) -> None:
        if self._connected:
            self._connected.cancel()
            await asyncio.wait([self._connected])
        for server in (*self._servers.values(), *self._retired):
            await server.channel.close()

    async def begin(self, request: Any, metadata: Any) -> tuple[_Server, str]:
        """(the call's server, its placement key). The caller must lower the server's `in_flight` after the call."""
        if self._connected is None:
            self._connected = asyncio.ensure_future(self._connect())
        await asyncio.shield(self._connected)
        if time.monotonic() >= self._resolved_at + self._by.refresh_s:
            self._resolved_at = time.monotonic()
            with contextlib.suppress(OSError):
                self._use(await asyncio.to_thread(resolve, self._address))
                await self._close_ended()
        # Calls that start together share one look-up.
        async with self._learning:
            if self._keys.unknown(request):
                with contextlib.suppress(grpc.RpcError):
                    await self._learn(metadata)
        key = self._keys.key(request)
        return self._choose(key), key

    def note(self, request: Any, key: str, reply: Any) -> None:
        """Learn a document's key or a task's adapter from an answer."""
        self._keys.note(request, key, reply)

    async def _reply(self, rpc: str, request: Any, *, timeout: float | None, metadata: Any) -> Any:
        server, key = await self.begin(request, metadata)
        try:
            reply = await getattr(server.stub, rpc)(request, timeout=timeout, metadata=metadata)
        finally:
            server.in_flight -= 1
        self.note(request, key, reply)
        return reply

    async def _connect(self) -> None:
        """Wait for the servers' connections, for a limited time."""
        ready = [asyncio.ensure_future(server.channel.channel_ready()) for server in self._servers.values()]
        try:
            await asyncio.wait(ready, timeout=_CONNECT_S)
        finally:
            for each in ready:
                each.cancel()

    def _choose(self, key: str) -> _Server:
        servers = list(self._servers.values())
        ready = {index for index, server in enumerate(servers) if server.ready}
        chosen = servers[self._rendezvous.choose(key, [each.in_flight for each in servers], ready)]
        chosen.in_flight += 1
        return chosen

    async def _learn(self, metadata: Any) -> None:
        """Ask a server for every task's adapter."""
        token, server = "", self._choose("")
        try:
            while True:
                request = pb.ListTasksRequest(page_token=token)
                page = await server.stub.ListTasks(request, timeout=_LIST_TIMEOUT_S, metadata=metadata)
                self._keys.learn({task.id: task.adapter_name for task in page.tasks})
                if not (token := page.next_page_token):
                    self._rendezvous.deal_out(self._keys.adapters)
                    return
        finally:
            server.in_flight -= 1

    def _use(self, addresses: tuple[str, ...]) -> None:
        """Update the servers to these addresses: keep known ones, add new ones, retire the rest."""
        old = self._servers
        self._servers = {each: old.get(each) or self._open(each) for each in addresses}
        self._retired += [server for address, server in old.items() if address not in self._servers]
        self._rendezvous = Rendezvous(addresses, slack=self._by.slack, floor=self._by.floor)
        self._rendezvous.deal_out(self._keys.adapters)

    def _open(self, address: str) -> _Server:
        channel = self._access.channel(grpc.aio, address, self._options)
        return _Server(channel, inference_pb2_grpc.InferenceStub(channel))

    async def _close_ended(self) -> None:
        """Close retired servers' channels, once their calls have ended."""
        ended = [server for server in self._retired if not server.in_flight]
        self._retired = [server for server in self._retired if server.in_flight]
        for server in ended:
            await server.channel.close()


class _Messages:
    """A stream of replies; the call begins when the first reply is awaited."""

    def __init__(self, placed: Placed, rpc: str, request: Any, *, timeout: float | None, metadata: Any) -> None:
        self._placed, self._rpc, self._request = placed, rpc, request
        self._call_with = {"timeout": timeout, "metadata": metadata}
        self._call: Any = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        server, key = await self._placed.begin(self._request, self._call_with["metadata"])
        self._call = getattr(server.stub, self._rpc)(self._request, **self._call_with)

        def ended(_: Any) -> None:
            server.in_flight -= 1

        self._call.add_done_callback(ended)
        async for message in self._call:
            if isinstance(message, pb.AnalyzeStreamResponse):
                self._placed.note(self._request, key, message)
            yield message

    def cancel(self) -> None:
        if self._call:
            self._call.cancel()
