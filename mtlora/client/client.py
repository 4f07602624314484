"""The clients, for threads and for asyncio. They depend only on the gRPC contract."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc, usage_pb2, usage_pb2_grpc
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client.access import OPEN, Access
from mtlora.client.errors import ServerError, server_errors
from mtlora.client.images import Classification, ImageSource, make_classification
from mtlora.client.messages import (
    Answer,
    BatchAnswer,
    DocumentAnswer,
    DocumentTask,
    Input,
    Score,
    make_analysis,
    make_batch,
    make_request,
    make_score,
)
from mtlora.client.retry import Attempts, Retry
from mtlora.client.upload import Upload

RETRY = Retry()
UPLOAD_TIMEOUT_S = 3600.0
# Calls go to every address of a name in turn. A server that ends cancels a call that crosses its GOAWAY on the way: no
# other failure of a server is CANCELLED.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "mtlora.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 4,
                "retryableStatusCodes": ["CANCELLED"],
            },
        }
    ],
}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A server that was restarted is asked again soon; gRPC's own longest wait is two minutes.
    ("grpc.max_reconnect_backoff_ms", 5000),
]

P = ParamSpec("P")
T = TypeVar("T")
# Yields (rpc, request, timeout in seconds), gets the reply, returns the method's result. An RPC that streams replies
# with (the first message, an iterator of the others).
Steps = Generator[tuple[Any, Any, float | None], Any, T]
# (rpc, request, timeout in seconds, what a message becomes)
Stream = tuple[Any, Any, float | None, Callable[[Any], T]]


class _Method(Generic[P, T]):
    """A method of both clients, written once: of Client it returns its result, of AsyncClient what to await."""

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


class _Streaming(Generic[P, T]):
    """As `_Method`, for a method that gives an iterator. Closing the iterator cancels the call."""

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


class _Connection:
    """A channel of `kind`, grpc or grpc.aio, and the calls of both clients. Every method raises ServerError.

    retry: repeats calls that a timeout leaves time for; None: no call is repeated. A stream is not repeated once a
    piece of it has come.
    """

    def __init__(self, kind: Any, address: str, access: Access, retry: Retry | None) -> None:
        self._channel = access.channel(kind, address, _OPTIONS)
        self._metadata = access.metadata()
        self._retry = retry
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdaptersStub(self._channel)
        self._usage = usage_pb2_grpc.UsageStub(self._channel)

    @_Method
    def generate(self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any) -> Steps[Answer]:
        """The answer to one input; `parameters` as for `make_request`."""
        return Answer.of((yield self._stub.Generate, make_request(task_id, input, **parameters), timeout))

    @_Streaming
    def stream(
        self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any
    ) -> Stream[pb.GenerateStreamResponse]:
        """The answer in pieces; the last one carries the summary."""
        return self._stub.GenerateStream, make_request(task_id, input, **parameters), timeout, _same

    @_Streaming
    def generate_batch(
        self,
        items: Iterable[tuple[str, Input] | pb.GenerateRequest],
        *,
        timeout: float | None = None,
        **parameters: Any,
    ) -> Stream[BatchAnswer]:
        """The answers to many inputs as they come; items as for `make_batch`."""

        def answer(message: pb.GenerateBatchStreamResponse) -> BatchAnswer:
            return BatchAnswer.of(message.item)

        return self._stub.GenerateBatchStream, make_batch(items, **parameters), timeout, answer

    @_Method
    def generate_all(
        self,
        items: Iterable[tuple[str, Input] | pb.GenerateRequest],
        *,
        timeout: float | None = None,
        **parameters: Any,
    ) -> Steps[list[BatchAnswer]]:
        """The answers to many inputs, in their order; items as for `make_batch`."""
        reply = yield self._stub.GenerateBatch, make_batch(items, **parameters), timeout
        return [BatchAnswer.of(item) for item in reply.items]

    @_Streaming
    def analyze(
        self,
        tasks: Iterable[DocumentTask],
        document: str | None = None,
        *,
        document_id: str = "",
        timeout: float | None = None,
        **parameters: Any,
    ) -> Stream[DocumentAnswer]:
        """The answers of many tasks about one document as they come; arguments as for `make_analysis`."""
        request = make_analysis(tasks, document, document_id=document_id, **parameters)
        return (
            self._stub.AnalyzeStream,
            request,
            timeout,
            lambda each: DocumentAnswer.about(each.document_id, each.item),
        )

    @_Method
    def analyze_all(
        self,
        tasks: Iterable[DocumentTask],
        document: str | None = None,
        *,
        document_id: str = "",
        timeout: float | None = None,
        **parameters: Any,
    ) -> Steps[list[DocumentAnswer]]:
        """The answers of many tasks about one document, in their order; arguments as for `make_analysis`."""
        request = make_analysis(tasks, document, document_id=document_id, **parameters)
        reply = yield self._stub.Analyze, request, timeout
        return [DocumentAnswer.about(reply.document_id, item) for item in reply.items]

    @_Method
    def classify(
        self,
        tasks: str | Iterable[str],
        images: Iterable[ImageSource],
        *,
        timeout: float | None = None,
        uncalibrated: bool = False,
        routing_key: str = "",
    ) -> Steps[list[Classification]]:
        """The labels of images by a task or several: image by image in their order, of an image task by task.

        An image is encoded bytes, a Path, or a prepared numpy array [3, size, size].
        """
        request = make_classification(tasks, images, uncalibrated=uncalibrated, routing_key=routing_key)
        return list(map(Classification.of, (yield self._stub.Classify, request, timeout).results))

    @_Method
    def score(
        self,
        task_id: str,
        inputs: Iterable[Input | ImageSource],
        *,
        timeout: float | None = None,
        uncalibrated: bool = False,
    ) -> Steps[list[Score]]:
        """The probabilities of a task's labels for many inputs, in their order."""
        reply = yield self._stub.Score, make_score(task_id, inputs, uncalibrated=uncalibrated), timeout
        return list(map(Score.of, reply.scores))

    @_Method
    def tasks(self, page_size: int = 0) -> Steps[list[pb.Task]]:
        """All tasks that can be asked."""
        tasks: list[pb.Task] = []
        token = ""
        while True:
            page = yield self._stub.ListTasks, pb.ListTasksRequest(page_size=page_size, page_token=token), None
            tasks += page.tasks
            if not (token := page.next_page_token):
                return tasks

    @_Method
    def task(self, task_id: str) -> Steps[pb.Task]:
        """One task."""
        return (yield self._stub.GetTask, pb.GetTaskRequest(task_id=task_id), None).task

    @_Method
    def adapters(self) -> Steps[list[adapters_pb2.Adapter]]:
        """Every adapter and its versions."""
        return list((yield self._adapters.List, adapters_pb2.ListAdaptersRequest(), None).adapters)

    @_Method
    def load_adapter(self, adapter: str, version: str = "") -> Steps[adapters_pb2.AdapterVersion]:
        """Let a version, the highest by default, serve; returns when it does."""
        request = adapters_pb2.LoadAdapterRequest(adapter=adapter, version=version)
        return (yield self._adapters.Load, request, None).serving

    @_Method
    def unload_adapter(self, adapter: str) -> Steps[None]:
        """Stop serving an adapter."""
        yield self._adapters.Unload, adapters_pb2.UnloadAdapterRequest(adapter=adapter), None

    @_Method
    def rollback_adapter(self, adapter: str) -> Steps[adapters_pb2.AdapterVersion]:
        """Let the previous version serve again."""
        return (yield self._adapters.Rollback, adapters_pb2.RollbackAdapterRequest(adapter=adapter), None).serving

    @_Method
    def pin_adapter(self, adapter: str, pinned: bool = True) -> Steps[None]:
        """Keep an adapter in the engine's memory, or stop keeping it."""
        if pinned:
            yield self._adapters.Pin, adapters_pb2.PinAdapterRequest(adapter=adapter), None
        else:
            yield self._adapters.Unpin, adapters_pb2.UnpinAdapterRequest(adapter=adapter), None

    @_Method
    def set_adapter_weights(self, weights: Mapping[str, int], *, adapter: str = "", task: str = "") -> Steps[None]:
        """Split the requests of an adapter, or of one task, among versions; no weights end the split."""
        target = {"task": task} if task else {"adapter": adapter}
        yield self._adapters.SetWeights, adapters_pb2.SetAdapterWeightsRequest(weights=weights, **target), None

    @_Method
    def download_manifest(self, adapter: str, version: str = "") -> Steps[adapters_pb2.DownloadAdapterResponse]:
        """The manifest of a version, by default of the serving one."""
        return (
            yield self._adapters.Download, adapters_pb2.DownloadAdapterRequest(adapter=adapter, version=version), None
        )

    @_Method
    def usage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str = "",
        task: str = "",
        by: str = "day",
    ) -> Steps["UsageReport"]:
        """What tenants used of tasks in a span, summed up by hour, day, month or "total"; iterate over it."""
        request = usage_pb2.ReadUsageRequest(
            since=since, until=until, tenant=tenant, task=task, granularity=f"USAGE_GRANULARITY_{by.upper()}"
        )
        return UsageReport(*(yield self._usage.Read, request, None))

    def _watch(self, adapter: str) -> Any:
        return self._adapters.Watch(adapters_pb2.WatchAdaptersRequest(adapter=adapter), metadata=self._metadata)


class Client(_Connection):
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
        """What happens to adapters from this call on. Closing the iterator ends it."""
        call = self._watch(adapter)
        with server_errors():
            # The server sends these once it watches.
            call.initial_metadata()
        return _read(call)

    def upload_adapter(self, folder: Path, adapter: str, *, timeout: float = UPLOAD_TIMEOUT_S) -> str:
        """Put a checkpoint into the server's folder as the adapter's next version, which is returned.

        Goes on after a cut, within the timeout. Raises OSError if the checkpoint cannot be read.
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
                # To the end: the server writes the call down before its status.
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
            if _streams(rpc):
                messages = self._messages(rpc, request, timeout, _same)
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


class UsageReport:
    """The sums, as they come, of a Client for `for`, of an AsyncClient for `async for`.

    Usage before `counted_since` (UTC) was not counted, and ends with the server's process unless `durable`.
    """

    def __init__(self, first: usage_pb2.ReadUsageResponse, messages: Any) -> None:
        self._messages = messages
        self.counted_since: datetime = first.counted_since.ToDatetime(UTC)
        self.durable: bool = first.durable

    def __iter__(self) -> Iterator[usage_pb2.UsageSum]:
        for message in self._messages:
            yield from message.sums

    async def __aiter__(self) -> AsyncIterator[usage_pb2.UsageSum]:
        async for message in self._messages:
            for each in message.sums:
                yield each


class AsyncClient(_Connection):
    """`Client` for asyncio, without health checks; an asynchronous context manager."""

    def __init__(self, address: str, access: Access = OPEN, retry: Retry | None = RETRY) -> None:
        super().__init__(grpc.aio, address, access, retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def watch_adapters(self, adapter: str = "") -> AsyncGenerator[adapters_pb2.AdapterEvent, None]:
        """As `Client.watch_adapters`: await this, then iterate over its result."""
        call = self._watch(adapter)
        with server_errors():
            await call.wait_for_connection()
        return _read_async(call)

    async def upload_adapter(self, folder: Path, adapter: str, *, timeout: float = UPLOAD_TIMEOUT_S) -> str:
        """As `Client.upload_adapter`."""
        upload, attempts = await asyncio.to_thread(Upload, folder, adapter), Attempts(self._retry, timeout)
        version = ""
        while True:
            known: asyncio.Queue[adapters_pb2.UploadAdapterResponse] = asyncio.Queue()

            async def requests(known: Any = known) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
                yield upload.begin()
                for request in upload.chunks(await known.get()):
                    yield request

            call = self._adapters.Upload(requests(), timeout=attempts.left_s, metadata=self._metadata)
            try:
                # To the end: the server writes the call down before its status.
                async for reply in _read_async(call):
                    if reply.version:
                        version = reply.version
                    else:
                        upload.note(reply, attempts)
                        known.put_nowait(reply)
                return version
            except ServerError as error:
                await asyncio.sleep(attempts.after(error))

    async def _run(self, steps: Steps[T]) -> T:
        reply: Any = None
        while True:
            try:
                rpc, request, timeout = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if _streams(rpc):
                messages = self._messages(rpc, request, timeout, _same)
                reply = await anext(messages), messages
            else:
                reply = await self._reply(rpc, request, timeout)

    async def _reply(self, rpc: Any, request: Any, timeout: float | None) -> Any:
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                with server_errors():
                    return await rpc(request, timeout=attempts.left_s, metadata=self._metadata)
            except ServerError as error:
                await asyncio.sleep(attempts.after(error))

    async def _messages(
        self, rpc: Any, request: Any, timeout: float | None, convert: Callable[[Any], T]
    ) -> AsyncGenerator[T, None]:
        attempts, begun = Attempts(self._retry, timeout), False
        while True:
            call = rpc(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                async with aclosing(_read_async(call)) as messages:
                    async for message in messages:
                        begun = True
                        yield convert(message)
                return
            except ServerError as error:
                if begun:
                    raise
                await asyncio.sleep(attempts.after(error))


def _same(message: Any) -> Any:
    return message


def _streams(rpc: Any) -> bool:
    return isinstance(rpc, grpc.UnaryStreamMultiCallable | grpc.aio.UnaryStreamMultiCallable)


def _read(call: Any) -> Iterator[Any]:
    try:
        with server_errors():
            yield from call
    finally:
        call.cancel()


async def _read_async(call: Any) -> AsyncGenerator[Any, None]:
    try:
        with server_errors():
            async for message in call:
                yield message
    finally:
        call.cancel()
