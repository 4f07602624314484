"""A channel to the server: TLS, and the calls of the contract on serialized messages."""

import asyncio
from collections.abc import Sequence
from typing import Any, Self

import grpc
from mtlora_pb.v1 import inference_pb2 as pb

from loadtest import LoadTestError
from loadtest.settings import Target

_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A retry would hide a lost answer.
    ("grpc.enable_retries", 0),
)
_CONNECT_S = 5.0

Metadata = Sequence[tuple[str, str]]


class Connection:
    """One channel; an asynchronous context manager. Messages are serialized beforehand, which makes sending cheap."""

    def __init__(self, target: Target) -> None:
        self._target = target
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if target.tls_server_name:
            options.append(("grpc.ssl_target_name_override", target.tls_server_name))
        if target.secure:
            files = (target.tls_root, target.tls_key, target.tls_certificate)
            try:
                root, key, chain = (file.read_bytes() if file else None for file in files)
            except OSError as error:
                raise LoadTestError(f"{error.filename}: cannot be read: {error.strerror}") from None
            credentials = grpc.ssl_channel_credentials(root, key, chain)
            self._channel = grpc.aio.secure_channel(target.address, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(target.address, options)
        self.generate: Any = self._channel.unary_unary(f"/{_SERVICE}/Generate")
        self.generate_stream: Any = self._channel.unary_stream(f"/{_SERVICE}/GenerateStream")
        self._list_tasks: Any = self._channel.unary_unary(f"/{_SERVICE}/ListTasks")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def wait_connected(self) -> None:
        """Raise LoadTestError if the server cannot be reached within seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), _CONNECT_S)
        except TimeoutError:
            how = "over TLS" if self._target.secure else "without TLS"
            raise LoadTestError(
                f"cannot reach a server at {self._target.address} ({how}) within {_CONNECT_S:g} s"
            ) from None

    async def tasks(self, metadata: Metadata) -> list[pb.Task]:
        """All tasks of texts of the server. Raises LoadTestError if the server does not list them."""
        tasks: list[pb.Task] = []
        token = ""
        while True:
            request = pb.ListTasksRequest(page_token=token).SerializeToString()
            try:
                reply = await self._list_tasks(request, metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                raise LoadTestError(
                    f"{self._target.address} does not list its tasks: {error.code().name}: {error.details()}"
                ) from None
            page = pb.ListTasksResponse.FromString(reply)
            tasks += (task for task in page.tasks if not task.HasField("image"))
            if not (token := page.next_page_token):
                return tasks
