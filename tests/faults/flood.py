"""A tenant's flood must not slow the others down; equal tenants under overload get equal service."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.harness.asking import closed_loop, open_loop
from benchmarks.harness.percentile import p99
from mtlora.client import AsyncClient, MetricsPage, ServerError
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from tests.faults._secured import Secured, secured_server
from tests.faults.scenario import Options, Row

ORDER = 50
P99_GOAL = 1.25
JAIN_GOAL = 0.98
_QUOTA = 1.0
_FLOOD = 10 * _QUOTA
_GENTLE = ("gentle-0", "gentle-1")
# Requests a second of each gentle tenant.
_RATE = 3.0
_EQUAL = ("equal-0", "equal-1", "equal-2", "equal-3")
# Without the prefix cache, and greedy: the same requests are the same work with the flood and without.
_SETTINGS: dict[str, Any] = {"max_num_seqs": 16, "max_in_flight": 256, "enable_prefix_caching": False}


def run(options: Options) -> Row:
    """Short turns with and without the flood, so that other load on the machine affects both alike."""
    turns, turn_s, backlog_s = (60, 5.0, 120.0) if options.full else (8, 4.0, 20.0)
    tenants: dict[str, Mapping[str, Any]] = {name: {} for name in (*_GENTLE, *_EQUAL)}
    tenants["flooder"] = {"requests_per_second": _QUOTA}
    with secured_server(options, tenants, **_SETTINGS) as secured:
        quiet, flooded, refused = asyncio.run(_turns(secured, turns, turn_s, options.seed))
        service = asyncio.run(_backlog(secured, backlog_s, options.seed))
    ratio, fairness = p99(flooded) / p99(quiet), jain(list(service.values()))
    return Row(
        "flood of 10 times a quota; fairness",
        f"others' p99 <= {P99_GOAL} x without; Jain's index >= {JAIN_GOAL}",
        f"p99 {ratio:.2f} x ({1e3 * p99(quiet):.0f} ms to {1e3 * p99(flooded):.0f} ms, {len(flooded)} requests, "
        f"{refused} of the flood refused); Jain {fairness:.4f}",
        met=ratio <= P99_GOAL and fairness >= JAIN_GOAL,
    )


def jain(values: list[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


@contextlib.asynccontextmanager
async def _clients(secured: Secured, names: tuple[str, ...]) -> Any:
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(AsyncClient(secured.server.address, secured.access[name]))
            for name in names
        }


async def _turns(secured: Secured, turns: int, turn_s: float, seed: int) -> tuple[list[float], list[float], int]:
    """(seconds of each gentle request without the flood, the same with it, number of refused requests of the flood)."""
    quiet: list[float] = []
    flooded: list[float] = []
    examples = _examples(4, seed)
    statuses: Counter[str] = Counter()

    async def gentle(client: AsyncClient, into: list[float], example: Example) -> None:
        began = time.perf_counter()
        await client.generate(example.task_id, example.input, max_new_tokens=16)
        into.append(time.perf_counter() - began)

    async def flood(client: AsyncClient, example: Example) -> None:
        try:
            await client.generate(example.task_id, example.input, max_new_tokens=16)
            statuses["OK"] += 1
        except ServerError as error:
            statuses[error.code.name] += 1

    def steadily(rate: float, rng: random.Random, ask: Callable[[Example], Awaitable[None]]) -> Awaitable[None]:
        number = int(turn_s * rate)
        return open_loop(rng.choices(examples, k=number), itertools.repeat(1 / rate), ask)

    async with _clients(secured, (*_GENTLE, "flooder")) as clients:
        for turn in range(-1, turns):
            for with_flood in (False, True):
                # The first turn warms up.
                into = [] if turn < 0 else flooded if with_flood else quiet
                # The same requests with the flood and without.
                loads = [
                    steadily(_RATE, random.Random(f"{seed}/{turn}/{name}"), partial(gentle, clients[name], into))
                    for name in _GENTLE
                ]
                if with_flood:
                    loads.append(steadily(_FLOOD, random.Random(turn), partial(flood, clients["flooder"])))
                await asyncio.gather(*loads)
    if set(statuses) - {"OK", "RESOURCE_EXHAUSTED"}:
        raise RuntimeError(f"the flood ended in {dict(statuses)}")
    return quiet, flooded, statuses["RESOURCE_EXHAUSTED"]


async def _backlog(secured: Secured, seconds: float, seed: int) -> dict[str, float]:
    """Service of equal tenants under overload. They differ in requests in flight and in the length of answers."""
    examples = _examples(2, seed)
    shapes = dict(zip(_EQUAL, ((24, 8), (24, 24), (48, 8), (48, 24)), strict=True))
    stopping = False

    async def backlog(name: str, client: AsyncClient) -> None:
        in_flight, max_new_tokens = shapes[name]
        rng = random.Random(f"{seed}/{name}")

        async def ask(example: Example) -> None:
            await client.generate(example.task_id, example.input, max_new_tokens=max_new_tokens, stop=[])

        endless = itertools.takewhile(lambda _: not stopping, (rng.choice(examples) for _ in itertools.count()))
        await closed_loop(endless, in_flight, ask)

    async with _clients(secured, _EQUAL) as clients:
        running = [asyncio.create_task(backlog(name, client)) for name, client in clients.items()]
        await asyncio.sleep(5)
        before = await asyncio.to_thread(MetricsPage.fetch, secured.server.metrics)
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(MetricsPage.fetch, secured.server.metrics)
        stopping = True
        await asyncio.gather(*running)
    sample = "mtlora_tenant_service_total"
    return {name: after.value(sample, tenant=name) - before.value(sample, tenant=name) for name in _EQUAL}


def _examples(per_task: int, seed: int) -> list[Example]:
    suite = load_suite("builtin")
    return [each for task in suite.tasks for each in suite.examples(task.id, "test", per_task, seed)]
