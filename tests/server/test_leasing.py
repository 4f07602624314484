"""A request's way to the engine by scheduler and residency together."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from server.job import Delta, GenerationJob
from server.registry.leasing import LeasingEngine
from server.registry.residency import Residency
from server.registry.version import AdapterVersion
from server.scheduling import Scheduler
from server.tenants import Tenant
from tests.server.test_residency import A, B, Loads
from tests.server.test_scheduler import JOB


class Sequences:
    async def generate(self, job: GenerationJob) -> AsyncIterator[Delta]:
        yield Delta("x", 1, finish_reason="stop")


async def test_requests_for_a_cold_adapter_as_many_as_fit_do_not_hold_up_one_for_a_warm_one() -> None:
    loads = Loads()
    loads.gate["b"] = asyncio.Event()
    scheduler, engine = Scheduler(4, 100), LeasingEngine(Sequences(), Residency(loads, 2))

    async def ask(version: AdapterVersion) -> str:
        job = replace(JOB, task=replace(JOB.task, version=version))
        async with scheduler.turn(Tenant(id="a"), job, None) as turn:
            return "".join([delta.text async for delta in engine.generate(job, turn.aside)])

    assert await ask(A) == "x"
    cold = [asyncio.create_task(ask(B)) for _ in range(4)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(1):
        assert await ask(A) == "x"
    assert not any(task.done() for task in cold)
    loads.gate["b"].set()
    async with asyncio.timeout(1):
        assert await asyncio.gather(*cold) == ["x"] * 4
    assert (scheduler.load.running, scheduler.load.queued) == (0, 0)
