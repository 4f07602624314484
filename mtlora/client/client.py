"""The client for threads."""

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import adapters_pb2

from mtlora.client.access import OPEN, Access
from mtlora.client.calls import RETRY, UPLOAD_TIMEOUT_S, Calls, same, streams
from mtlora.client.errors import ServerError, server_errors
from mtlora.client.method import Steps, T
from mtlora.client.retry import Attempts, Retry
from mtlora.client.upload import Upload


class Client(Calls):
    """A blocking client; a context manager. Every method raises ServerError."""

    def __init__(self, address: str, access: Access = OPEN, retry: Retry | None = RETRY) -> None:
        super().__init__(grpc, address, access, retry)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def watch_adapters(self, adapter: str = "") -> Iterator[adapters_pb2.AdapterEvent]:
        """Iterate over adapter events from this call on. Closing the iterator ends the call."""
        call = self._watch(adapter)
        with server_errors():
            # Wait for the initial metadata: the server sends it once it watches, so no later event is missed.
            call.initial_metadata()
        return _read(call)

    def upload_adapter(self, folder: Path | str, adapter: str, *, timeout: float = UPLOAD_TIMEOUT_S) -> str:
        """Upload a checkpoint as the adapter's next version; returns the version.

        Resumes after a broken connection, within the timeout. Raises OSError if the checkpoint cannot be read.
        """
        upload, attempts, version = Upload(folder, adapter), Attempts(self._retry, timeout), ""
        while True:
            known: SimpleQueue[adapters_pb2.UploadAdapterResponse | None] = SimpleQueue()

            def requests(known: Any = known) -> Iterator[adapters_pb2.UploadAdapterRequest]:
                yield upload.begin()
                if (reply := known.get()) is not None:
                    yield from upload.chunks(reply)

            call = self._adapters.Upload(requests(), timeout=attempts.left_s, metadata=self._metadata)
            try:
                # Read up to the status: the server records the call before it sends the status.
                for reply in _read(call):
                    if reply.version:
                        version = reply.version
                    else:
                        upload.note(reply, attempts)
                        known.put(reply)
                return version
            except ServerError as error:
                time.sleep(attempts.after(error))
            finally:
                known.put(None)

    def is_serving(self, service: str = "", timeout: float = 2.0) -> bool:
        """Whether a service is healthy; False if the server cannot be reached."""
        try:
            reply = self._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server is serving. Raises TimeoutError."""
        until = time.monotonic() + timeout
        while not self.is_serving():
            if time.monotonic() > until:
                raise TimeoutError(f"not serving after {timeout:g} s")
            time.sleep(0.1)

    def _run(self, steps: Steps[T]) -> T:
        reply: Any = None
        while True:
            try:
                rpc, request, timeout = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if streams(rpc):
                messages = self._messages(rpc, request, timeout, same)
                reply = next(messages), messages
            else:
                reply = self._reply(rpc, request, timeout)

    def _reply(self, rpc: Any, request: Any, timeout: float | None) -> Any:
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                with server_errors():
                    return rpc(request, timeout=attempts.left_s, metadata=self._metadata)
            except ServerError as error:
                time.sleep(attempts.after(error))

    def _messages(
        self, rpc: Any, request: Any, timeout: float | None, convert: Callable[[Any], T]
    ) -> Generator[T, None, None]:
        attempts, begun = Attempts(self._retry, timeout), False
        while True:
            try:
                for message in _read(rpc(request, timeout=attempts.left_s, metadata=self._metadata)):
                    begun = True
                    yield convert(message)
                return
            except ServerError as error:
                if begun:
                    raise
                time.sleep(attempts.after(error))


def _read(call: Any) -> Iterator[Any]:
    try:
        with server_errors():
            yield from call
    finally:
        call.cancel()
