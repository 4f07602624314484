"""The calls of both clients: how requests are made and replies converted. They depend only on the gRPC contract."""

import json
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import grpc
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc, usage_pb2, usage_pb2_grpc
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client.access import Access
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
from mtlora.client.method import Method, Steps, Stream, Streaming
from mtlora.client.retry import Retry
from mtlora.client.usage_report import UsageReport

RETRY = Retry()
UPLOAD_TIMEOUT_S = 3600.0
# Send calls to a name's addresses in turn. A stopping server cancels calls that arrive after its GOAWAY; no other
# server failure gives CANCELLED.
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
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Reconnect soon to a restarted server: gRPC itself waits up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 5000),
]


class Calls:
    """A channel of `kind` (grpc or grpc.aio) and the calls that both clients have. Every method raises ServerError.

    retry: repeats failed calls while their timeout allows; None: no call is repeated. A stream is not repeated after
    its first piece has arrived.
    """

    def __init__(self, kind: Any, address: str, access: Access, retry: Retry | None) -> None:
        self._channel = access.channel(kind, address, OPTIONS)
        self._metadata = access.metadata()
        self._retry = retry
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdaptersStub(self._channel)
        self._usage = usage_pb2_grpc.UsageStub(self._channel)

    @Method
    def generate(
        self, task_id: str, input: Input = "", *, timeout: float | None = None, **parameters: Any
    ) -> Steps[Answer]:
        """The answer to one input; `parameters` as for `make_request`."""
        return Answer.of((yield self._stub.Generate, make_request(task_id, input, **parameters), timeout))

    @Streaming
    def stream(
        self, task_id: str, input: Input = "", *, timeout: float | None = None, **parameters: Any
    ) -> Stream[pb.GenerateStreamResponse]:
        """The answer in pieces; the last piece carries the summary."""
        return self._stub.GenerateStream, make_request(task_id, input, **parameters), timeout, same

    @Streaming
    def generate_batch(
        self,
        items: Iterable[tuple[str, Input] | pb.GenerateRequest],
        *,
        timeout: float | None = None,
        **parameters: Any,
    ) -> Stream[BatchAnswer]:
        """The answers to many inputs, each as soon as it is complete; items as for `make_batch`."""

        def answer(message: pb.GenerateBatchStreamResponse) -> BatchAnswer:
            return BatchAnswer.of(message.item)

        return self._stub.GenerateBatchStream, make_batch(items, **parameters), timeout, answer

    @Method
    def generate_all(
        self,
        items: Iterable[tuple[str, Input] | pb.GenerateRequest],
        *,
        timeout: float | None = None,
        **parameters: Any,
    ) -> Steps[list[BatchAnswer]]:
        """The answers to many inputs, in the inputs' order; items as for `make_batch`."""
        reply = yield self._stub.GenerateBatch, make_batch(items, **parameters), timeout
        return [BatchAnswer.of(item) for item in reply.items]

    @Streaming
    def analyze(
        self,
        tasks: Iterable[DocumentTask],
        document: str | None = None,
        *,
        document_id: str = "",
        timeout: float | None = None,
        **parameters: Any,
    ) -> Stream[DocumentAnswer]:
        """The answers of many tasks about one document, each once complete; arguments as for `make_analysis`."""
        request = make_analysis(tasks, document, document_id=document_id, **parameters)
        return (
            self._stub.AnalyzeStream,
            request,
            timeout,
            lambda each: DocumentAnswer.about(each.document_id, each.item),
        )

    @Method
    def analyze_all(
        self,
        tasks: Iterable[DocumentTask],
        document: str | None = None,
        *,
        document_id: str = "",
        timeout: float | None = None,
        **parameters: Any,
    ) -> Steps[list[DocumentAnswer]]:
        """The answers of many tasks about one document, in the tasks' order; arguments as for `make_analysis`."""
        request = make_analysis(tasks, document, document_id=document_id, **parameters)
        reply = yield self._stub.Analyze, request, timeout
        return [DocumentAnswer.about(reply.document_id, item) for item in reply.items]

    @Method
    def classify(
        self,
        tasks: str | Iterable[str],
        images: Iterable[ImageSource],
        *,
        timeout: float | None = None,
        uncalibrated: bool = False,
        routing_key: str = "",
    ) -> Steps[list[Classification]]:
        """The labels of images by one or several tasks, in the images' order, each image task by task.

        An image is encoded bytes, a Path, or a prepared numpy array [3, size, size].
        """
        request = make_classification(tasks, images, uncalibrated=uncalibrated, routing_key=routing_key)
        return list(map(Classification.of, (yield self._stub.Classify, request, timeout).results))

    @Method
    def score(
        self,
        task_id: str,
        inputs: Iterable[Input | ImageSource],
        *,
        timeout: float | None = None,
        uncalibrated: bool = False,
        routing_key: str = "",
    ) -> Steps[list[Score]]:
        """The probabilities of a task's labels for many inputs, in the inputs' order."""
        request = make_score(task_id, inputs, uncalibrated=uncalibrated, routing_key=routing_key)
        return list(map(Score.of, (yield self._stub.Score, request, timeout).scores))

    @Method
    def tasks(self, page_size: int = 0, *, timeout: float | None = None) -> Steps[list[pb.Task]]:
        """All tasks that are served; the timeout covers all pages."""
        tasks: list[pb.Task] = []
        until = None if timeout is None else time.monotonic() + timeout
        token = ""
        while True:
            left_s = None if until is None else max(0.0, until - time.monotonic())
            page = yield self._stub.ListTasks, pb.ListTasksRequest(page_size=page_size, page_token=token), left_s
            tasks += page.tasks
            if not (token := page.next_page_token):
                return tasks

    @Method
    def task(self, task_id: str, *, timeout: float | None = None) -> Steps[pb.Task]:
        """One task."""
        return (yield self._stub.GetTask, pb.GetTaskRequest(task_id=task_id), timeout).task

    @Method
    def adapters(self, *, timeout: float | None = None) -> Steps[list[adapters_pb2.Adapter]]:
        """Every adapter and its versions."""
        return list((yield self._adapters.List, adapters_pb2.ListAdaptersRequest(), timeout).adapters)

    @Method
    def load_adapter(
        self, adapter: str, version: str = "", *, timeout: float | None = None
    ) -> Steps[adapters_pb2.AdapterVersion]:
        """Let a version serve, by default the highest; returns once it serves."""
        request = adapters_pb2.LoadAdapterRequest(adapter=adapter, version=version)
        return (yield self._adapters.Load, request, timeout).serving

    @Method
    def unload_adapter(self, adapter: str, *, timeout: float | None = None) -> Steps[None]:
        """Stop serving an adapter."""
        yield self._adapters.Unload, adapters_pb2.UnloadAdapterRequest(adapter=adapter), timeout

    @Method
    def rollback_adapter(self, adapter: str, *, timeout: float | None = None) -> Steps[adapters_pb2.AdapterVersion]:
        """Let the previous version serve again. Not repeated: a second rollback goes further back."""
        request = adapters_pb2.RollbackAdapterRequest(adapter=adapter)
        return (yield _once(self._adapters.Rollback, timeout), request, None).serving

    @Method
    def pin_adapter(self, adapter: str, pinned: bool = True, *, timeout: float | None = None) -> Steps[None]:
        """Pin an adapter in the engine's memory, or unpin it."""
        if pinned:
            yield self._adapters.Pin, adapters_pb2.PinAdapterRequest(adapter=adapter), timeout
        else:
            yield self._adapters.Unpin, adapters_pb2.UnpinAdapterRequest(adapter=adapter), timeout

    @Method
    def set_adapter_weights(
        self, weights: Mapping[str, int], *, adapter: str = "", task: str = "", timeout: float | None = None
    ) -> Steps[None]:
        """Split the requests of an adapter, or of one task, among versions; empty weights end the split."""
        target = {"task": task} if task else {"adapter": adapter}
        yield self._adapters.SetWeights, adapters_pb2.SetAdapterWeightsRequest(weights=weights, **target), timeout

    @Method
    def download_manifest(
        self, adapter: str, version: str = "", *, timeout: float | None = None
    ) -> Steps[adapters_pb2.DownloadAdapterResponse]:
        """The manifest of a version, by default of the serving one."""
        request = adapters_pb2.DownloadAdapterRequest(adapter=adapter, version=version)
        return (yield self._adapters.Download, request, timeout)

    @Method
    def usage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str = "",
        task: str = "",
        by: str = "day",
        timeout: float | None = None,
    ) -> Steps[UsageReport]:
        """Tenants' usage by task in a time span, summed by hour, day, month or "total"; iterate over it."""
        request = usage_pb2.ReadUsageRequest(
            since=since, until=until, tenant=tenant, task=task, granularity=f"USAGE_GRANULARITY_{by.upper()}"
        )
        return UsageReport(*(yield self._usage.Read, request, timeout))

    def _watch(self, adapter: str) -> Any:
        return self._adapters.Watch(adapters_pb2.WatchAdaptersRequest(adapter=adapter), metadata=self._metadata)


def same(message: Any) -> Any:
    """Return a message unchanged."""
    return message


def _once(rpc: Any, timeout: float | None) -> Any:
    """Call an RPC once, with a deadline."""
    return lambda request, metadata, **_: rpc(request, timeout=timeout, metadata=metadata)


def streams(rpc: Any) -> bool:
    """Whether an RPC's response is a stream."""
    return isinstance(rpc, grpc.UnaryStreamMultiCallable | grpc.aio.UnaryStreamMultiCallable)
