"""A batch beside another tenant's single requests, on an engine whose steps a test takes one by one."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mtlora.client import AsyncClient, make_request
from server.job import Delta, GenerationJob, Lane
from server.rpc.validation import PromptLimits
from server.scheduling import batch_turns, engine_turns
from tests.server.fakes import FakeEngine, Service
from tests.waiting import eventually

SEQUENCES, STEP_TOKENS = 64, 2048
# Seconds of a step: a fixed part, a part per sequence, a part per prompt token.
STEP_S, SEQUENCE_S, PROMPT_S = 0.03, 0.001, 0.0004
PROMPT, ANSWER_TOKENS = "x" * 100, (7, 20, 4, 13, 16, 10, 18, 5)


class _Sequence:
    def __init__(self, job: GenerationJob) -> None:
        self.prompt = len(job.prompt_ids)
        self.left = job.sampling.max_new_tokens
        self.tenant = job.cache_salt
        self.ended = asyncio.Event()


class Stepped(FakeEngine):
    """Schedules as vLLM does: first come, first served, in the tokens of a step.

    now: seconds that its steps took. ends: of these, when each sequence of tenant b ended.
    """

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.now = 0.0
        self.ends: list[float] = []
        self._waiting: deque[_Sequence] = deque()
        self._batch: list[_Sequence] = []
        self._scheduler = service.scheduler

    @property
    def inside(self) -> int:
        return len(self._waiting) + len(self._batch)

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        self.jobs.append(job)
        sequence = _Sequence(job)
        self._waiting.append(sequence)
        await sequence.ended.wait()
        yield Delta("a", job.sampling.max_new_tokens, finish_reason="stop")

    def step(self) -> None:
        while self._waiting and len(self._batch) < SEQUENCES:
            self._batch.append(self._waiting.popleft())
        room = STEP_TOKENS
        for sequence in self._batch:
            computed = min(room, sequence.prompt)
            sequence.prompt -= computed
            room -= computed
            if not sequence.prompt:
                sequence.left -= 1
        self.now += STEP_S + SEQUENCE_S * len(self._batch) + PROMPT_S * (STEP_TOKENS - room)
        ended = [each for each in self._batch if not each.left]
        self._batch = [each for each in self._batch if each.left]
        for sequence in ended:
            sequence.ended.set()
            if sequence.tenant == "b":
                self.ends.append(self.now)
        self._scheduler.stepped(Lane.TEXT)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Service, Stepped, AsyncClient, AsyncClient]]:
    """A server, its engine, and clients of two tenants."""
    service = Service.with_tenants(
        folder, {"a": {}, "b": {}}, 256, turns=engine_turns(SEQUENCES), most_batch=batch_turns(SEQUENCES)
    )
    engine = Stepped(service)
    service.use(engine, limits=PromptLimits(max_model_len=400, vocab_size=300))
    async with service.running(), service.client("a") as many, service.client("b") as single:
        yield service, engine, many, single


async def slowest(
    service: Service, engine: Stepped, client: AsyncClient, settle: Callable[[], Awaitable[None]]
) -> float:
    """The most seconds of the engine that a neighbour's request takes, of eight asked one after the other."""
    seconds = []
    for number in range(1, 9):

        def came(number: int = number) -> bool:
            queued = service.scheduler.queued_by_tenant().get("b", 0)
            return queued + sum(job.cache_salt == "b" for job in engine.jobs) == number

        asked = asyncio.create_task(client.generate("one", PROMPT, max_new_tokens=4))
        await eventually(came)
        began = engine.now
        while len(engine.ends) < number:
            engine.step()
            await settle()
        seconds.append(engine.ends[-1] - began)
        await asked
    return max(seconds)


@pytest.mark.slow
async def test_a_neighbour_waits_beside_a_batch_as_beside_single_requests(tmp_path: Path) -> None:
    lengths = itertools.cycle(ANSWER_TOKENS)
    async with serving(tmp_path) as (service, engine, many, single):

        async def in_a_loop() -> None:
            while True:
                await many.generate("one", PROMPT, max_new_tokens=next(lengths))

        async def all_ask_again() -> None:
            await eventually(lambda: engine.inside >= SEQUENCES)

        loops = [asyncio.create_task(in_a_loop()) for _ in range(SEQUENCES)]
        for _ in range(20):
            # The first answers all begin together.
            await all_ask_again()
            engine.step()
        beside_singles = await slowest(service, engine, single, all_ask_again)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
    async with serving(tmp_path) as (service, engine, many, single):

        async def items_follow() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        items = [make_request("one", PROMPT, max_new_tokens=next(lengths)) for _ in range(1000)]
        batch = asyncio.create_task(many.generate_all(items))
        await eventually(lambda: engine.inside > 0)
        beside_batch = await slowest(service, engine, single, items_follow)
        # The engine is full, except for the sequences that a batch must leave to others.
        assert engine.inside >= batch_turns(SEQUENCES) - 1
        assert not batch.done()
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
    assert beside_batch < 1.25 * beside_singles
