"""A score is one request in summary, usage, metrics and traces, however many sequences it takes."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

from mtlora.client import AsyncClient
from server.accounting import UsageCounts
from server.job import Delta, GenerationJob
from server.telemetry.genai import GenAIMetrics
from server.telemetry.tracing import Tracer
from tests.server.fakes import Service
from tests.server.typed import Scripted, with_types


class Caching(Scripted):
    """Finds all but a token of each prompt in its cache."""

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        async for delta in super().generate(job):
            yield replace(delta, cached_tokens=len(job.prompt_ids) - 1, scheduled_at=1.0)


@pytest.mark.parametrize("task", ["label", "worked"])
async def test_every_account_counts_one_request(task: str) -> None:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracer, service = Tracer("", exporter=spans), Service()
    tracer.metrics = GenAIMetrics("", Resource.create(), service.metrics.task_label, reader)
    with_types(service)
    service.use(Caching())
    async with service.running(tracer) as running, AsyncClient(running.address) as client:
        (score,) = await client.score(task, ["a"])
    measured = reader.get_metrics_data()
    tracer.close()
    summary = score.summary
    assert summary is not None
    assert len(service.engine.jobs) > 1
    prompt, completion = summary.prompt_tokens, summary.completion_tokens
    assert summary.cached_tokens == prompt - 1
    assert [row[3] for row in await service.used()] == [UsageCounts(1, prompt, prompt - 1, completion)]
    assert service.value("mtlora_prompt_tokens_total", task=task) == prompt
    assert service.value("mtlora_completion_tokens_total", task=task) == completion
    for histogram in ("queue", "time_to_first_token", "request"):
        assert service.value(f"mtlora_{histogram}_seconds_count") == 1
    (span,) = (each for each in spans.get_finished_spans() if each.name.endswith("/Score"))
    told: dict[str, Any] = dict(span.attributes or {})
    assert told[names.GEN_AI_USAGE_INPUT_TOKENS] == prompt
    assert told[names.GEN_AI_USAGE_OUTPUT_TOKENS] == completion
    assert told[names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] == prompt - 1
    assert told[names.GEN_AI_RESPONSE_FINISH_REASONS] == ("stop",)
    assert measured is not None
    (scope,) = measured.resource_metrics[0].scope_metrics
    (points,) = (each.data.data_points for each in scope.metrics if each.name == "gen_ai.server.request.duration")
    assert [getattr(point, "count", 0) for point in points] == [1]
