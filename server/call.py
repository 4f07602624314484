"""What is known of the call that the current asyncio task answers: shared by interceptor and servicer."""

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
    # Label of metrics: the task's id where it is served, else "unknown"; empty where the method takes no task.
    task: str
    received: float = field(default_factory=time.monotonic)
    tenant: Tenant = OPEN_TENANT
    # time.monotonic() of the deadline; None where the client set none.
    deadline: float | None = None
    trace: RequestTrace | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


_current: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    return _current.get()


def set_current_call(call: Call) -> None:
    _current.set(call)
