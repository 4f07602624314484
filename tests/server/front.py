"""Quotas, turns and the door, wired as the server does it; a clock that a test moves; and requests that pass them."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc
from google.rpc import error_details_pb2, status_pb2

from server.accounting import Usage
from server.errors import RequestFailedError
from server.job import GenerationJob, ImageJob, Lane, Sampling, ServedTask
from server.scheduling import Admission, Quotas, Scheduler, State, Turn, Turns
from server.telemetry.metrics import Metrics
from server.tenants import Tenant
from tests.server.adapters import entry

A, B = Tenant(id="a"), Tenant(id="b")
# 10 tokens of prompt, 20 of answer at most; and an image that costs 16.25 tokens.
JOB = GenerationJob(ServedTask(entry("one"), "x", "1", slot=None), (1,) * 10, Sampling(max_new_tokens=20))
IMAGE = ImageJob(JOB.task, range(65), 0.25)


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Front:
    """What a request passes before the engine; `admission` is open."""

    def __init__(
        self,
        turns: int = 2,
        max_queued: int = 4,
        *,
        image_turns: int = 1,
        most_batch: int | None = None,
        max_in_flight: int = 1000,
        spare: int = 0,
        usage: Usage | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics = metrics or Metrics()
        self.turns = {Lane.TEXT: Turns(turns, most_batch or turns), Lane.IMAGES: Turns(image_turns, image_turns)}
        self.quotas = Quotas(metrics, clock)
        self.scheduler = Scheduler(self.turns, max_queued, self.quotas, metrics, clock)
        usage = usage or Usage(None, metrics)
        self.admission = Admission(max_in_flight, self.scheduler, self.quotas, usage, metrics, spare=spare)
        self.admission.state = State.SERVING

    @property
    def running(self) -> int:
        """Requests that have their turn, of any engine."""
        return sum(turns.running for turns in self.turns.values())

    @property
    def queued(self) -> int:
        """Requests that wait for their turn."""
        return sum(self.scheduler.queued_by_tenant().values())

    def service(self, tenant: str) -> float:
        """What a tenant was served, as the fair queue counts it."""
        return self.metrics.registry.get_sample_value("mtlora_tenant_service_total", {"tenant": tenant}) or 0.0


async def hold(front: Front, stack: AsyncExitStack, tenant: Tenant = A) -> Turn:
    """Hold a turn until the stack's end."""
    stack.enter_context(front.admission.admit(tenant))
    turn = await stack.enter_async_context(front.scheduler.turn(tenant, JOB, None))
    turn.submitted()
    return turn


async def wait_for(front: Front, tenant: Tenant, done: list[str], deadline: float | None = None) -> None:
    """Wait for a turn, give it back at once, and add the tenant to `done`."""
    with front.admission.admit(tenant):
        async with front.scheduler.turn(tenant, JOB, deadline) as turn:
            turn.submitted()
            done.append(tenant.id)


async def settle() -> None:
    """Let every task that is ready run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def quota_details(error: RequestFailedError) -> tuple[float, list[tuple[str, str]]]:
    """(seconds to wait, quotas) of a RESOURCE_EXHAUSTED."""
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry, quotas = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for each in status_pb2.Status.FromString(error.status_details()).details:
        each.Unpack(retry) or each.Unpack(quotas)
    return retry.retry_delay.ToMilliseconds() / 1e3, [(each.subject, each.description) for each in quotas.violations]
