"""OpenTelemetry traces, if a collector is set: a tree of spans per request, from the RPC to the engine's steps.

    mtlora.v1.Inference/Generate     from receipt to status
      admission                      until the engine is asked: authorisation, tokenization, the tenant's queue
      engine.queue                   until the engine's scheduler first takes the sequence, its adapter loaded
      engine.prefill                 until its first token
      engine.decode                  until its last, with an event a step

A call may have several sequences: the first three spans end when its first sequence is handed over, is scheduled, has a
token; the last span ends with the last step of any sequence. The call's span has the GenAI attributes of its first
sequence, and the tokens of all.

Spans are made when the request ends, from recorded times, so a token costs only one list append.
"""

import time
from collections.abc import Callable
from typing import Any

from server.job import Job
from server.telemetry.genai import GenAIMetrics, request_attributes, response_attributes

# Most events of a span; further steps of a longer answer have no event.
_MAX_STEPS = 120
# Both clocks at one moment: spans need wall time, the engine gives monotonic time.
_WALL_MINUS_MONOTONIC_NS = time.time_ns() - time.monotonic_ns()


class Tracer:
    """Starts traces and exports them over OTLP/gRPC, in batches, from a thread of its own.

    endpoint: `host:port` or `http://host:port` of a collector, in plain text; `https://` for TLS.
    sample_ratio: share of traces kept, unless the caller has decided.
    exporter: takes the spans instead of an endpoint.
    label_of: if given, metrics are exported too; see GenAIMetrics.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        sample_ratio: float = 1.0,
        exporter: Any = None,
        label_of: Callable[[str], str] | None = None,
    ) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from mtlora import __version__

        url = endpoint if "://" in endpoint else f"http://{endpoint}"
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=url, insecure=not url.startswith("https://"))
        resource = Resource.create({SERVICE_NAME: "mtlora-server", SERVICE_VERSION: __version__})
        self.metrics = GenAIMetrics(url, resource, label_of) if label_of else None
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            resource=resource,
            # `close` does this before the interpreter exits.
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mtlora.server")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, rpc: str, request_id: str, metadata: Any) -> "RequestTrace | None":
        """The trace of a request received now, inside the caller's if `traceparent` names one; None if not sampled.

        rpc: `/SERVICE/METHOD`. metadata: (key, value) pairs of the call, or None.
        """
        from opentelemetry.trace import SpanKind

        service, _, method = rpc.removeprefix("/").partition("/")
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "mtlora.request_id": request_id,
            },
        )
        return RequestTrace(self._tracer, span, request_id, method) if span.is_recording() else None

    def close(self) -> None:
        """Export the last spans; blocks for a few seconds at most."""
        self._provider.force_flush(3000)
        self._provider.shutdown()
        if self.metrics:
            self.metrics.close()


class RequestTrace:
    """One request's monotonic times, in seconds; `end` makes its spans."""

    def __init__(self, tracer: Any, span: Any, request_id: str, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._request_id = request_id
        self._stream = method.endswith("Stream")
        self._job: Job | None = None
        self._finish_reasons: list[str] = []
        self._tokens = {"input": 0, "output": 0, "cached": 0, "working": 0}
        self._began = time.monotonic()
        self._submitted: float | None = None
        self._scheduled: float | None = None
        self._steps: list[tuple[float, int]] = []

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, the form that collectors write."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def submitted(self, job: Job) -> None:
        """Note that the engine gets the job now."""
        self._submitted = self._submitted or time.monotonic()
        self._job = self._job or job
        self._tokens["input"] += len(job.prompt_ids)

    def scheduled(self, at: float) -> None:
        """The scheduler first took the sequence, at a monotonic time."""
        self._scheduled = self._scheduled or at

    def step(self, tokens: int, at: float) -> None:
        """A step of the engine gave the sequence its next tokens, at a monotonic time."""
        self._steps.append((at, tokens))
        self._tokens["output"] += tokens

    def answered(self, finish_reason: str | None, cached_tokens: int, working_tokens: int) -> None:
        """A sequence has ended."""
        self._finish_reasons.append(finish_reason or "length")
        self._tokens["cached"] += cached_tokens
        self._tokens["working"] += working_tokens

    def end(self, status: str, *, task: str, tenant: str) -> None:
        """The request has ended, with a gRPC status name."""
        from opentelemetry.trace import Status, StatusCode

        now = time.monotonic()
        submitted = self._submitted or now
        self._child("admission", self._began, submitted)
        if self._submitted is not None:
            # The engine's clock may be slightly behind the time of the hand-over.
            scheduled = max(submitted, self._scheduled) if self._scheduled is not None else now
            self._child("engine.queue", submitted, scheduled)
            if self._scheduled is not None:
                first = self._steps[0][0] if self._steps else now
                self._child("engine.prefill", scheduled, first, {"mtlora.prompt_tokens": self._tokens["input"]})
            if self._steps:
                self._decode()
        attributes = {
            "mtlora.task": task,
            "mtlora.tenant": tenant,
            "mtlora.prompt_tokens": self._tokens["input"],
            "mtlora.completion_tokens": self._tokens["output"],
            "rpc.grpc.status": status,
        }
        if self._job:
            attributes |= request_attributes(self._job, stream=self._stream)
            attributes |= response_attributes(self._request_id, self._finish_reasons, self._tokens)
        self._span.set_attributes({name: value for name, value in attributes.items() if value != ""})
        if status not in ("OK", "CANCELLED"):
            self._span.set_status(Status(StatusCode.ERROR, status))
            self._span.set_attribute("error.type", status)
        self._span.end()

    def _decode(self) -> None:
        span = self._start("engine.decode", self._steps[0][0], {"mtlora.steps": len(self._steps)})
        for at, tokens in self._steps[:_MAX_STEPS]:
            span.add_event("step", {"mtlora.tokens": tokens}, timestamp=_wall_ns(at))
        span.end(_wall_ns(self._steps[-1][0]))

    def _child(self, name: str, began: float, ended: float, attributes: dict[str, Any] | None = None) -> None:
        self._start(name, began, attributes).end(_wall_ns(max(began, ended)))

    def _start(self, name: str, began: float, attributes: dict[str, Any] | None) -> Any:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        return self._tracer.start_span(name, context=context, attributes=attributes, start_time=_wall_ns(began))


def _wall_ns(monotonic_s: float) -> int:
    return int(monotonic_s * 1e9) + _WALL_MINUS_MONOTONIC_NS
