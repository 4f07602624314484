"""A request's way through scheduler, residency and engine."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from server.call import Call
from server.job import Delta, GenerationJob
from server.registry.residency import Residency
from server.registry.version import AdapterVersion
from server.rpc.generation import Generation
from server.telemetry.metrics import Metrics
from tests.server.front import JOB, Front
from tests.server.slots import Loads, serving_version


class OneTokenEngine:
    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        yield Delta("x", 1, finish_reason="stop")


async def test_a_full_engines_worth_of_cold_requests_does_not_delay_a_warm_one() -> None:
    warm, cold = serving_version("a"), serving_version("b")
    loads, metrics = Loads(), Metrics()
    loads.gate["b"] = asyncio.Event()
    front, residency, engine = Front(4, 100, metrics=metrics), Residency(loads, 2), OneTokenEngine()

    async def ask(wanted: AdapterVersion) -> str:
        generation = Generation(replace(JOB, task=replace(JOB.task, version=wanted)), Call("r", "Generate"), metrics)
        await generation.run(engine, front.scheduler, residency)  # type: ignore[arg-type]
        return generation.text

    assert await ask(warm) == "x"
    waiting = [asyncio.create_task(ask(cold)) for _ in range(4)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        assert await ask(warm) == "x"
    assert not any(task.done() for task in waiting)
    loads.gate["b"].set()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*waiting) == ["x"] * 4
    assert (front.running, front.queued) == (0, 0)
