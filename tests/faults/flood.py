"""One tenant floods; the others must not feel it. And equal tenants that all want more than there is get the same."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mtlora.client import AsyncClient, ServerError
from mtlora.suite import load_suite
from tests.faults._secured import Secured, metrics, secured_server
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
# Greedy, and without the prefix cache: the same requests are the same work, with the flood and without.
_SETTINGS: dict[str, Any] = {"max_num_seqs": 16, "max_in_flight": 256, "enable_prefix_caching": False}


def run(options: Options) -> Row:
    """Short turns with and without the flood, so that what else the machine does falls on both alike."""
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


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def jain(values: list[float]) -> float:
    """Jain's fairness index: 1 where all are equal, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


@contextlib.asynccontextmanager
async def _clients(secured: Secured, names: tuple[str, ...]) -> Any:
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(AsyncClient(secured.server.address, secured.access[name]))
            for name in names
        }


async def _turns(secured: Secured, turns: int, turn_s: float, seed: int) -> tuple[list[float], list[float], int]:
    """(seconds of the gentle tenants' requests without the flood, with it, refused requests of the flood)."""
    quiet: list[float] = []
    flooded: list[float] = []
    suite = load_suite("builtin")
    examples = [each for task in suite.tasks for each in suite.examples(task.id, "test", 4, seed)]
    statuses: Counter[str] = Counter()

    async def ask(client: AsyncClient, rng: random.Random, seconds: list[float]) -> None:
        example = rng.choice(examples)
        began = time.perf_counter()
        await client.generate(example.task_id, example.input, max_new_tokens=16)
        seconds.append(time.perf_counter() - began)

    async def flood(client: AsyncClient, rng: random.Random) -> None:
        example = rng.choice(examples)
        try:
            await client.generate(example.task_id, example.input, max_new_tokens=16)
            statuses["OK"] += 1
        except ServerError as error:
            statuses[error.code.name] += 1

    async def steadily(rate: float, seconds: float, make: Any) -> None:
        """An open loop: a request every 1 / rate seconds, whatever becomes of the others."""
        began, running = time.perf_counter(), []
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            running.append(asyncio.create_task(make()))
        await asyncio.gather(*running)

    async with _clients(secured, (*_GENTLE, "flooder")) as clients:
        for turn in range(-1, turns):
            for with_flood in (False, True):
                # The same requests in both; the first turn warms up.
                rng = random.Random(f"{seed}/{turn}")
                into = [] if turn < 0 else flooded if with_flood else quiet
                loads = [
                    steadily(_RATE, turn_s, lambda name=name, rng=rng, into=into: ask(clients[name], rng, into))
                    for name in _GENTLE
                ]
                if with_flood:
                    other = random.Random(turn)
                    loads.append(steadily(_FLOOD, turn_s, lambda other=other: flood(clients["flooder"], other)))
                await asyncio.gather(*loads)
    if set(statuses) - {"OK", "RESOURCE_EXHAUSTED"}:
        raise RuntimeError(f"the flood ended in {dict(statuses)}")
    return quiet, flooded, statuses["RESOURCE_EXHAUSTED"]


async def _backlog(secured: Secured, seconds: float, seed: int) -> dict[str, float]:
    """Service of equal tenants that always have more to do: few and many requests at a time, short and long ones."""
    suite = load_suite("builtin")
    texts = [each for task in suite.tasks for each in suite.examples(task.id, "test", 2, seed)]
    shapes = dict(zip(_EQUAL, ((24, 8), (24, 24), (48, 8), (48, 24)), strict=True))
    stopping = False

    async def worker(name: str, client: AsyncClient, rng: random.Random) -> None:
        while not stopping:
            example = rng.choice(texts)
            await client.generate(example.task_id, example.input, max_new_tokens=shapes[name][1], stop=[])

    async with _clients(secured, _EQUAL) as clients:
        workers = [
            asyncio.create_task(worker(name, clients[name], random.Random(f"{seed}/{name}/{number}")))
            for name in _EQUAL
            for number in range(shapes[name][0])
        ]
        await asyncio.sleep(5)
        before = await asyncio.to_thread(metrics, secured.server)
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(metrics, secured.server)
        stopping = True
        await asyncio.gather(*workers)
    names = {name: f'mtlora_tenant_service_total{{tenant="{name}"}}' for name in _EQUAL}
    return {name: after[sample] - before[sample] for name, sample in names.items()}
