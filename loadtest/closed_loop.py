"""A closed loop: a fixed number of requests in flight, tasks drawn uniformly, until a number has been sent."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mtlora.client import AsyncClient, ServerError
from mtlora.suite.base import Example
from mtlora.task import is_correct


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: gRPC status name, seconds to its end, tokens, and whether its exact answer was right."""

    task_id: str
    status: str
    seconds: float
    time_to_first_token_s: float
    prompt_tokens: int
    completion_tokens: int
    correct: bool


async def run(address: str, examples: Sequence[Example], *, in_flight: int, seed: int) -> tuple[list[Outcome], float]:
    """Send every example once, `in_flight` at a time, in shuffled order; returns outcomes and seconds in all."""
    waiting = list(examples)
    random.Random(seed).shuffle(waiting)
    outcomes: list[Outcome] = []

    async def worker(client: AsyncClient) -> None:
        while waiting:
            outcomes.append(await _ask(client, waiting.pop()))

    async with AsyncClient(address) as client:
        began = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(in_flight)))
        return outcomes, time.perf_counter() - began


async def _ask(client: AsyncClient, example: Example) -> Outcome:
    began = time.perf_counter()
    try:
        answer = await client.generate(example.task_id, example.input)
    except ServerError as error:
        return Outcome(example.task_id, error.code.name, time.perf_counter() - began, 0.0, 0, 0, False)
    summary = answer.summary
    return Outcome(
        example.task_id,
        "OK",
        time.perf_counter() - began,
        summary.timings.time_to_first_token.ToTimedelta().total_seconds(),
        summary.prompt_tokens,
        summary.completion_tokens,
        is_correct(answer.text, example.target),
    )
