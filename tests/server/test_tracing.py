"""One tree of spans a request, delivered to a collector over OTLP."""

import asyncio
from itertools import pairwise
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2, inference_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

from mtlora.client import AsyncClient, ServerError
from server.errors import EngineAbortedError
from server.job import Delta
from server.telemetry.genai import GenAIMetrics
from server.telemetry.tracing import Tracer
from tests.server.fakes import Service
from tests.servicers import serving

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
    collector, service = Collector(), Service()
    loop = asyncio.get_running_loop()
    service.engine.deltas = [
        Delta(" a", 1, scheduled_at=loop.time()), Delta("b", 1), Delta("c", 2, finish_reason="stop"),
    ]  # fmt: skip
    with serving(collector, trace_service_pb2_grpc.add_TraceServiceServicer_to_server) as (address, _):
        tracer = Tracer(address)
        async with service.running(tracer) as running, grpc.aio.insecure_channel(running.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(task_id="one", text="x")
            await stub.Generate(request, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(inference_pb2.GenerateRequest(task_id="none", text="x"))
        await asyncio.to_thread(tracer.close)
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
    told = {key: value.WhichOneof("value") and value for key, value in attributes.items() if key.startswith("gen_ai.")}
    assert told[names.GEN_AI_OPERATION_NAME].string_value == "text_completion"
    assert told[names.GEN_AI_REQUEST_MODEL].string_value == "one"
    assert told[names.GEN_AI_RESPONSE_MODEL].string_value == "alpha/1"
    assert told[names.GEN_AI_REQUEST_MAX_TOKENS].int_value == 32
    assert told[names.GEN_AI_USAGE_INPUT_TOKENS].int_value == len("x\nAnswer:")
    assert told[names.GEN_AI_USAGE_OUTPUT_TOKENS].int_value == 4
    assert [each.string_value for each in told[names.GEN_AI_RESPONSE_FINISH_REASONS].array_value.values] == ["stop"]
    assert not told[names.GEN_AI_REQUEST_STREAM].bool_value
    failed = [span for span in collector.spans if span.status.code == 2]
    assert [span.status.message for span in failed] == ["NOT_FOUND"]


async def test_metrics_have_the_names_of_the_conventions() -> None:
    """Metrics count every request, sampled or not; a batch's items are requests of their models."""
    tracer, reader = Tracer("", sample_ratio=0.0, exporter=InMemorySpanExporter()), InMemoryMetricReader()
    service = Service()
    tracer.metrics = GenAIMetrics("", Resource.create(), service.metrics.task_label, reader)
    async with service.running(tracer) as running, AsyncClient(running.address) as client:
        await client.generate("one", "x")
        await client.generate_all([("two", [{"role": "user", "content": "x"}])])
        service.engine.error = EngineAbortedError("abort")
        with pytest.raises(ServerError):
            await client.generate("one", "x")
    found = reader.get_metrics_data()
    assert found is not None
    points = {
        metric.name: {tuple(sorted(point.attributes.items())): point for point in metric.data.data_points}
        for metric in found.resource_metrics[0].scope_metrics[0].metrics
    }
    assert set(points) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.client.token.usage",
    }
    durations = {
        (
            attributes.get("gen_ai.request.model"),
            attributes.get("gen_ai.operation.name"),
            attributes.get("error.type"),
        ): point.count
        for attributes, point in ((dict(key), point) for key, point in points["gen_ai.server.request.duration"].items())
    }
    assert durations == {
        ("one", "text_completion", None): 1,
        ("two", "chat", None): 1,
        ("one", "text_completion", "UNAVAILABLE"): 1,
    }
    usage = {dict(key)["gen_ai.token.type"]: point.sum for key, point in points["gen_ai.client.token.usage"].items()}
    assert set(usage) == {"input", "output"}
    tracer.close()


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
