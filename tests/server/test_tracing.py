"""One tree of spans a request, delivered to a collector over OTLP."""

import asyncio
from concurrent import futures
from itertools import pairwise
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2, inference_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.job import Delta
from server.telemetry.tracing import Tracer
from tests.server.fakes import Service

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_request_is_one_tree_at_the_collector() -> None:
    collector = Collector()
    sink = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, sink)
    port = sink.add_insecure_port("127.0.0.1:0")
    sink.start()
    tracer = Tracer(f"127.0.0.1:{port}")
    service = Service()
    loop = asyncio.get_running_loop()
    service.engine.deltas = [
        Delta(" a", 1, scheduled_at=loop.time()), Delta("b", 1), Delta("c", 2, finish_reason="stop"),
    ]  # fmt: skip
    try:
        async with service.running(tracer) as running, grpc.aio.insecure_channel(running.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(task_id="one", text="x")
            await stub.Generate(request, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(inference_pb2.GenerateRequest(task_id="none", text="x"))
        await asyncio.to_thread(tracer.close)
    finally:
        sink.stop(0).wait()
    mine = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    root = mine["mtlora.v1.Inference/Generate"]
    assert root.parent_span_id.hex() == PARENT
    assert set(mine) == {root.name, "admission", "engine.queue", "engine.prefill", "engine.decode"}
    assert {span.parent_span_id for span in mine.values()} == {bytes.fromhex(PARENT), root.span_id}
    ordered = [mine[name] for name in ("admission", "engine.queue", "engine.prefill", "engine.decode")]
    for before, after in pairwise(ordered):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    tokens = [event.attributes[0].value.int_value for event in mine["engine.decode"].events]
    assert tokens == [1, 1, 2]
    attributes = {a.key: a.value for a in root.attributes}
    assert attributes["mtlora.completion_tokens"].int_value == 4
    failed = [span for span in collector.spans if span.status.code == 2]
    assert [span.status.message for span in failed] == ["NOT_FOUND"]


def test_a_request_that_is_not_sampled_has_no_trace() -> None:
    spans = InMemorySpanExporter()
    tracer = Tracer("", sample_ratio=0.0, exporter=spans)
    assert tracer.begin("/mtlora.v1.Inference/Generate", "r", None) is None
    traced = tracer.begin("/mtlora.v1.Inference/Generate", "r", (("traceparent", f"00-{TRACE}-{PARENT}-01"),))
    assert traced is not None
    assert traced.trace_id == TRACE
    traced.end("CANCELLED", task="one", tenant="")
    tracer.close()
    assert [span.name for span in spans.get_finished_spans()] == ["admission", "mtlora.v1.Inference/Generate"]
