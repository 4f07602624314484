"""The RPC that the current asyncio task answers: the interceptor sets it, the services read it."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.telemetry.tracing import RequestTrace
from server.tenants import OPEN_TENANT, Tenant


@dataclass
class Call:
    """One RPC, from receipt to status."""

    request_id: str
    method: str
    # Label of metrics: the task's id if it is served, else "unknown"; empty for methods that take no task.
    task: str = ""
    received: float = field(default_factory=time.monotonic)
    tenant: Tenant = OPEN_TENANT
    # time.monotonic() of the deadline; None if the client set none.
    deadline: float | None = None
    trace: RequestTrace | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def exemplar(self) -> dict[str, str]:
        """What a histogram's sample points to."""
        return {"trace_id": self.trace.trace_id} if self.trace else {"request_id": self.request_id}


current_call: ContextVar[Call] = ContextVar("call")
