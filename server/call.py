"""The RPC that the current asyncio task answers: the interceptor sets it, the services read it."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.accounting import AuditedCall, Counts, Usage
from server.telemetry.tracing import RequestTrace
from server.tenants import UNAUTHENTICATED, Tenant


@dataclass
class Call:
    """One RPC, from receipt to status."""

    request_id: str
    method: str
    # Label of metrics: the task's id if it is served, else "unknown"; empty for methods that take no task.
    task: str = ""
    received: float = field(default_factory=time.monotonic)
    tenant: Tenant = UNAUTHENTICATED
    # time.monotonic() of the deadline; None if the client set none.
    deadline: float | None = None
    trace: RequestTrace | None = None
    audited: AuditedCall | None = None
    # What the engine took of the call, and made for it: sequences, and their tokens.
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    counted: bool = False

    def count_in(self, usage: Usage) -> None:
        """Count what the engine did for this call, once: before the client can have the whole answer."""
        if self.sequences and not self.counted:
            self.counted = True
            counts = Counts(self.sequences, self.prompt_tokens, self.cached_tokens, self.completion_tokens)
            usage.record(self.tenant.id, self.task, counts)

    @property
    def exemplar(self) -> dict[str, str]:
        """What a histogram's sample points to."""
        return {"trace_id": self.trace.trace_id} if self.trace else {"request_id": self.request_id}


current_call: ContextVar[Call] = ContextVar("call")
