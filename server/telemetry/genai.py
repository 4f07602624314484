"""OpenTelemetry's semantic conventions for generative AI: attributes of a request's span, and metrics over OTLP.

Names come from the conventions' package. The requested model is the task; the answering model is the adapter's version.
"""

from collections.abc import Callable, Mapping
from typing import Any

from server.job import ImageJob, Job

PROVIDER = "mtlora"
# Bounds that the conventions advise.
_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_SECONDS_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4**power for power in range(14))


def operation_of(job: Job) -> str:
    """The operation's name; only a chat's answer keeps its outer blanks. The conventions have none for images."""
    if isinstance(job, ImageJob):
        return "image_classification"
    return "text_completion" if job.strip else "chat"


def request_attributes(job: Job, *, stream: bool) -> dict[str, Any]:
    """Attributes known before the request runs: operation, model, parameters."""
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

    attributes: dict[str, Any] = {
        names.GEN_AI_OPERATION_NAME: operation_of(job),
        names.GEN_AI_PROVIDER_NAME: PROVIDER,
        names.GEN_AI_REQUEST_MODEL: job.task.spec.id,
        names.GEN_AI_RESPONSE_MODEL: f"{job.task.adapter_name}/{job.task.adapter_version}",
    }
    if isinstance(job, ImageJob):
        return attributes
    sampling, more = job.sampling, job.sampling.more
    if job.without_adapter:
        del attributes[names.GEN_AI_RESPONSE_MODEL]
    attributes |= {
        names.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_new_tokens,
        names.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
        names.GEN_AI_REQUEST_TOP_P: sampling.top_p,
        names.GEN_AI_REQUEST_TOP_K: sampling.top_k,
        names.GEN_AI_REQUEST_STOP_SEQUENCES: sampling.stop,
        names.GEN_AI_REQUEST_STREAM: stream,
    }
    if sampling.seed is not None:
        attributes[names.GEN_AI_REQUEST_SEED] = sampling.seed
    if job.n > 1:
        attributes[names.GEN_AI_REQUEST_CHOICE_COUNT] = job.n
    if more:
        attributes[names.GEN_AI_REQUEST_PRESENCE_PENALTY] = more.presence_penalty
        attributes[names.GEN_AI_REQUEST_FREQUENCY_PENALTY] = more.frequency_penalty
    return {name: value for name, value in attributes.items() if value != ""}


def response_attributes(request_id: str, finish_reasons: list[str], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Attributes of the outcome. tokens: input, output, cached, working."""
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names

    return {
        names.GEN_AI_RESPONSE_ID: request_id,
        names.GEN_AI_RESPONSE_FINISH_REASONS: finish_reasons,
        names.GEN_AI_USAGE_INPUT_TOKENS: tokens["input"],
        names.GEN_AI_USAGE_OUTPUT_TOKENS: tokens["output"],
        names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: tokens["cached"],
        names.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: tokens["working"],
    }


class GenAIMetrics:
    """Histograms of sequences, sent to a collector once a minute from a thread of its own.

    label_of: the value of the bounded label for a task. reader: takes the metrics instead of the endpoint.
    """

    def __init__(self, url: str, resource: Any, label_of: Callable[[str], str], reader: Any = None) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names
        from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

        if reader is None:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            exporter = OTLPMetricExporter(endpoint=url, insecure=not url.startswith("https://"))
            reader = PeriodicExportingMetricReader(exporter)
        self._provider = MeterProvider((reader,), resource, shutdown_on_exit=False)
        self._label_of = label_of
        self._names = names
        meter = self._provider.get_meter("mtlora.server")

        def histogram(name: str, unit: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit, explicit_bucket_boundaries_advisory=bounds)

        self._duration = histogram(gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION, "s", _SECONDS)
        self._first = histogram(gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN, "s", _SECONDS)
        self._per_token = histogram(gen_ai_metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN, "s", _SECONDS_PER_TOKEN)
        self._usage = histogram(gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE, "{token}", _TOKENS)

    def answered(self, job: Job, tokens: int, first_s: float, whole_s: float) -> None:
        """Count a sequence that has ended: its generated tokens, and seconds from the receipt of the request."""
        attributes = self._attributes(job)
        self._duration.record(whole_s, attributes)
        self._first.record(first_s, attributes)
        if tokens > 1:
            self._per_token.record((whole_s - first_s) / (tokens - 1), attributes)
        for kind, count in (("input", len(job.prompt_ids)), ("output", tokens)):
            self._usage.record(count, attributes | {self._names.GEN_AI_TOKEN_TYPE: kind})

    def failed(self, job: Job, error: str, whole_s: float) -> None:
        """Count a sequence that ended in an error, by its type."""
        self._duration.record(whole_s, self._attributes(job) | {"error.type": error})

    def close(self) -> None:
        """Export the last values; blocks for a few seconds at most."""
        self._provider.shutdown(3000)

    def _attributes(self, job: Job) -> dict[str, str]:
        names, task = self._names, self._label_of(job.task.spec.id)
        return {
            names.GEN_AI_OPERATION_NAME: operation_of(job),
            names.GEN_AI_PROVIDER_NAME: PROVIDER,
            names.GEN_AI_REQUEST_MODEL: task,
        }
