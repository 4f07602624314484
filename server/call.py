"""The RPC of the current asyncio task: the interceptor sets it, the services read it."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from server.accounting import AuditedCall, Usage, UsageCounts
from server.errors import from_exception
from server.job import Job
from server.telemetry.genai import GenAIMetrics
from server.telemetry.logs import get_logger
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import RequestTrace
from server.tenants import UNAUTHENTICATED, Tenant

logger = get_logger("request")

# Tolerance: a client's deadline starts earlier, so its cancellation may arrive just before the server's deadline.
DEADLINE_SLACK_S = 0.1
# Statuses that are the server's fault; such calls do not count as usage.
_SERVERS_OWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}


@dataclass
class Call:
    """One RPC, or one item of a batch, from receipt to status."""

    request_id: str
    method: str
    # Task label of metrics: the task's id if it is served, else "unknown"; empty for methods without a task.
    task: str = ""
    received: float = field(default_factory=time.monotonic)
    tenant: Tenant = UNAUTHENTICATED
    # time.monotonic() of the deadline; None if the client set none.
    deadline: float | None = None
    trace: RequestTrace | None = None
    genai: GenAIMetrics | None = None
    audited: AuditedCall | None = None
    # The engine's work for the call: sequences, and tokens read and generated.
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    counted: bool = False

    def item(self, index: int, method: str) -> "Call":
        """The call of one item of this one, for usage, metrics and log."""
        return replace(self, request_id=f"{self.request_id}.{index}", method=method, audited=None)

    def count_in(self, usage: Usage) -> None:
        """Count the engine's work for this call, once, before the client gets the end of the answer."""
        if self.sequences and not self.counted:
            self.counted = True
            counts = UsageCounts(self.sequences, self.prompt_tokens, self.cached_tokens, self.completion_tokens)
            usage.record(self.tenant.id, self.task, counts)

    def settle(self, code: grpc.StatusCode, usage: Usage) -> None:
        """Count the usage of a call that has ended with this status."""
        if code not in _SERVERS_OWN:
            self.count_in(usage)

    def record(self, code: grpc.StatusCode, metrics: Metrics) -> None:
        """Update the metrics for a call that has ended, and write its log line."""
        known: dict[str, Any] = {
            "tenant": self.tenant.id,
            "task": self.task,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
        metrics.record_request(method=self.method, status=code.name, **known)
        fields = {
            "request_id": self.request_id,
            "method": self.method,
            **known,
            "status": code.name,
            "ms": round((time.monotonic() - self.received) * 1e3, 1),
        }
        logger.info("request", extra={"fields": fields})

    def failed(self, job: Job, error: BaseException) -> None:
        """Note that a job of the call has ended in an error."""
        if self.genai is None:
            return
        cancelled = "DEADLINE_EXCEEDED" if self.expired else "CANCELLED"
        kind = from_exception(error).code.name if isinstance(error, Exception) else cancelled
        self.genai.failed(job, kind, time.monotonic() - self.received)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed or is about to: the client's clock starts before the server's."""
        return self.deadline is not None and time.monotonic() >= self.deadline - DEADLINE_SLACK_S

    @property
    def exemplar(self) -> dict[str, str]:
        """The id for a histogram's exemplar: the trace's, or the request's if there is no trace."""
        return {"trace_id": self.trace.trace_id} if self.trace else {"request_id": self.request_id}


current_call: ContextVar[Call] = ContextVar("call")
