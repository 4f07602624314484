"""Python clients of the server, for threads and for asyncio. Depends on the contract alone."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client.access import OPEN, Access

# A text for a one-field template, named fields, or the messages of a chat.
Input = str | Mapping[str, str] | Sequence[Mapping[str, str]]

_OPTIONS = [("grpc.max_receive_message_length", -1)]
_DETAILS = (
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
    error_details_pb2.RetryInfo,
)


class ServerError(Exception):
    """A request that did not end in OK."""

    def __init__(self, error: Any) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        trailer = dict(error.trailing_metadata() or ())
        self.request_id = str(trailer.get("x-request-id", ""))
        # Field and description, a pair each.
        self.violations: list[tuple[str, str]] = []
        self.retry_after_s: float | None = None
        self.resource: str | None = None
        # Subject and description of each quota that the request is beyond.
        self.quotas: list[tuple[str, str]] = []
        for detail in _unpack(trailer.get("grpc-status-details-bin", b"")):
            if isinstance(detail, error_details_pb2.BadRequest):
                self.violations = [(each.field, each.description) for each in detail.field_violations]
            elif isinstance(detail, error_details_pb2.QuotaFailure):
                self.quotas = [(each.subject, each.description) for each in detail.violations]
            elif isinstance(detail, error_details_pb2.ResourceInfo):
                self.resource = detail.resource_name
            elif isinstance(detail, error_details_pb2.RetryInfo):
                self.retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
        super().__init__(f"{self.code.name}: {self.message}")


@dataclass(frozen=True)
class Answer:
    text: str
    summary: pb.Summary
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    # What the model wrote before its answer, where it was asked for.
    reasoning: str = ""


def make_request(
    task_id: str,
    input: Input,
    *,
    without_adapter: bool = False,
    include_reasoning: bool = False,
    routing_key: str = "",
    **parameters: Any,
) -> pb.GenerateRequest:
    """The message for one input. `parameters` are those of GenerationParameters; `stop` is a list of strings."""
    request = pb.GenerateRequest(
        task_id=task_id,
        without_adapter=without_adapter,
        include_reasoning=include_reasoning,
        routing_key=routing_key,
    )
    if isinstance(input, str):
        request.text = input
    elif isinstance(input, Mapping):
        request.fields.values.update(input)
        request.fields.SetInParent()
    else:
        request.chat.messages.extend(pb.ChatMessage(**message) for message in input)
        request.chat.SetInParent()
    if (stop := parameters.pop("stop", None)) is not None:
        request.parameters.stop.values.extend(stop)
        request.parameters.stop.SetInParent()
    request.parameters.MergeFrom(pb.GenerationParameters(**parameters))
    return request


class Client:
    """A blocking client; a context manager. Every method raises ServerError."""

    def __init__(self, address: str, access: Access = OPEN) -> None:
        self._channel = access.channel(grpc, address, _OPTIONS)
        self._metadata = access.metadata()
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdaptersStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any) -> Answer:
        """The answer to one input; `parameters` as for `make_request`."""
        try:
            reply = self._stub.Generate(
                make_request(task_id, input, **parameters), timeout=timeout, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise ServerError(error) from None
        return Answer(reply.text, reply.summary, list(reply.logprobs), reply.reasoning)

    def stream(
        self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any
    ) -> Iterator[pb.GenerateStreamResponse]:
        """The answer in pieces; the last one carries the summary. Closing the iterator cancels the request."""
        call = self._stub.GenerateStream(
            make_request(task_id, input, **parameters), timeout=timeout, metadata=self._metadata
        )
        try:
            yield from call
        except grpc.RpcError as error:
            raise ServerError(error) from None
        finally:
            call.cancel()

    def tasks(self, page_size: int = 0) -> list[pb.Task]:
        """All tasks that can be asked."""
        tasks: list[pb.Task] = []
        token = ""
        while True:
            try:
                page = self._stub.ListTasks(
                    pb.ListTasksRequest(page_size=page_size, page_token=token), metadata=self._metadata
                )
            except grpc.RpcError as error:
                raise ServerError(error) from None
            tasks += page.tasks
            if not (token := page.next_page_token):
                return tasks

    def task(self, task_id: str) -> pb.Task:
        try:
            return self._stub.GetTask(pb.GetTaskRequest(task_id=task_id), metadata=self._metadata).task
        except grpc.RpcError as error:
            raise ServerError(error) from None

    def adapters(self) -> list[adapters_pb2.Adapter]:
        """Every adapter and its versions."""
        return list(self._admin("List", adapters_pb2.ListAdaptersRequest()).adapters)

    def load_adapter(self, adapter: str, version: str = "") -> adapters_pb2.AdapterVersion:
        """Let a version, the highest by default, serve; returns when it does."""
        return self._admin("Load", adapters_pb2.LoadAdapterRequest(adapter=adapter, version=version)).serving

    def unload_adapter(self, adapter: str) -> None:
        """Stop serving an adapter."""
        self._admin("Unload", adapters_pb2.UnloadAdapterRequest(adapter=adapter))

    def rollback_adapter(self, adapter: str) -> adapters_pb2.AdapterVersion:
        """Let the version serve that served before."""
        return self._admin("Rollback", adapters_pb2.RollbackAdapterRequest(adapter=adapter)).serving

    def pin_adapter(self, adapter: str, pinned: bool = True) -> None:
        """Keep an adapter in the engine's memory, or no longer."""
        if pinned:
            self._admin("Pin", adapters_pb2.PinAdapterRequest(adapter=adapter))
        else:
            self._admin("Unpin", adapters_pb2.UnpinAdapterRequest(adapter=adapter))

    def set_adapter_weights(self, weights: Mapping[str, int], *, adapter: str = "", task: str = "") -> None:
        """Split the requests of an adapter, or of one task, among versions; no weights end the split."""
        request = adapters_pb2.SetAdapterWeightsRequest(weights=weights)
        if task:
            request.task = task
        else:
            request.adapter = adapter
        self._admin("SetWeights", request)

    def watch_adapters(self, adapter: str = "") -> Iterator[adapters_pb2.AdapterEvent]:
        """What happens to adapters from now on. Closing the iterator ends it."""
        call = self._adapters.Watch(adapters_pb2.WatchAdaptersRequest(adapter=adapter))
        try:
            # From here on nothing is missed.
            call.initial_metadata()
        except grpc.RpcError as error:
            raise ServerError(error) from None
        return self._read(call)

    def _read(self, call: Any) -> Iterator[Any]:
        try:
            yield from call
        except grpc.RpcError as error:
            raise ServerError(error) from None
        finally:
            call.cancel()

    def _admin(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._adapters, method)(request)
        except grpc.RpcError as error:
            raise ServerError(error) from None

    def is_serving(self, service: str = "", timeout: float = 2.0) -> bool:
        """The health of a service; False where the server cannot be reached."""
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


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(self, address: str, access: Access = OPEN) -> None:
        self._channel = access.channel(grpc.aio, address, _OPTIONS)
        self._metadata = access.metadata()
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any) -> Answer:
        try:
            reply = await self._stub.Generate(
                make_request(task_id, input, **parameters), timeout=timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise ServerError(error) from None
        return Answer(reply.text, reply.summary, list(reply.logprobs), reply.reasoning)

    async def stream(
        self, task_id: str, input: Input, *, timeout: float | None = None, **parameters: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call = self._stub.GenerateStream(
            make_request(task_id, input, **parameters), timeout=timeout, metadata=self._metadata
        )
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise ServerError(error) from None
        finally:
            call.cancel()


def _unpack(serialized: bytes) -> Iterator[Any]:
    try:
        packed = status_pb2.Status.FromString(serialized).details
    except DecodeError:
        return
    for each in packed:
        for kind in _DETAILS:
            if each.Is(kind.DESCRIPTOR):
                message = kind()
                each.Unpack(message)
                yield message
