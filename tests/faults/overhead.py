"""Throughput of the server with TLS, keys and quotas, divided by that of the engine without a server."""

import asyncio
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.adapters import random_tasks, write_random_adapter
from benchmarks.harness.processes import halted
from benchmarks.harness.worker import WorkerProcess
from mtlora.backbone import identify, resolve
from mtlora.client import Access, AsyncClient
from mtlora.suite import load_suite
from tests.faults._engine_worker import PARAMETERS
from tests.faults._secured import secured_server
from tests.faults.scenario import Options, Row

ORDER = 60
GOAL = 0.95
_TENANTS = 5
# Settings of both servers. Without the prefix cache, which keeps other blocks each round, every round is the same work.
SETTINGS: dict[str, Any] = {"max_num_seqs": 64, "kv_cache_gib": 1.0, "enable_prefix_caching": False}
# Waves of requests per side and round. With one wave, mostly its start and end would be measured.
_ROUND_S = 3.0
_MIN_WAVES = 2
# The server admits no more.
_MAX_WAVES = 6
_MIN_ROUNDS = 3
# Quotas that are counted for every request and never reached.
_QUOTAS = {"requests_per_second": 10_000, "tokens_per_second": 1_000_000, "max_in_flight": 500, "max_queue": 500}


def run(options: Options) -> Row:
    """Rounds of the same requests to both in turn. The figure is the median of the rounds' ratios.

    The adapter is random, with 25 tasks, as in `make bench`: answers have full length, so both do the same work.
    """
    at_least_s = 180.0 if options.full else 40.0
    options = dataclasses.replace(options, adapters=options.folder / "adapters")
    entries = random_tasks(25)
    identity = identify(resolve(options.backbone))
    write_random_adapter(options.adapters / "random" / "1", identity, entries, seed=options.seed)
    suite = load_suite("builtin")
    tasks = [entry.id for entry in entries]
    wave = [
        (tasks[index % 25], task.render(each.input))
        for index, task in enumerate(suite.tasks)
        for each in suite.examples(task.id, "test", 3, options.seed)
    ][: SETTINGS["max_num_seqs"]]
    owner = {task: f"tenant-{index % _TENANTS}" for index, task in enumerate(tasks)}
    tenants = {
        name: {"tasks": [task for task in tasks if owner[task] == name], **_QUOTAS} for name in set(owner.values())
    }
    engine = WorkerProcess(
        "tests.faults._engine_worker", {"backbone": options.backbone, "adapters": str(options.adapters), **SETTINGS}
    )
    with secured_server(options, tenants, max_in_flight=512, **SETTINGS) as secured, engine:

        def alone() -> float:
            with halted(secured.server.process.pid):
                reply = engine.ask({"requests": requests})
            return _rate(reply["tokens"], reply["seconds"], requests)

        def served() -> float:
            with halted(engine.pid):
                return asyncio.run(_serve(secured.server.address, secured.access, requests, owner))

        # The first round warms both up, and says how many waves fill the time.
        requests = wave
        served()
        wave_s = len(wave) * PARAMETERS["max_new_tokens"] / alone()
        waves = min(_MAX_WAVES, max(_MIN_WAVES, math.ceil(_ROUND_S / wave_s)))
        requests = wave * waves
        ratios, rates = [], []
        for number in range(max(_MIN_ROUNDS, int(at_least_s / (2 * waves * wave_s)))):
            # Which comes first alternates, so that a drift of the machine's speed cancels out.
            by = {each: each() for each in ((served, alone) if number % 2 else (alone, served))}
            rates.append(by[served])
            ratios.append(by[served] / by[alone])
    ratio = statistics.median(ratios)
    return Row(
        "throughput with TLS, auth, quotas / in process",
        f">= {GOAL}",
        f"{ratio:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f}, of {len(requests)} requests; {len(tasks)} tasks, "
        f"{_TENANTS} tenants, {statistics.median(rates):.0f} tokens/s)",
        met=ratio >= GOAL,
    )


async def _serve(
    address: str, access: Mapping[str, Access], requests: list[tuple[str, str]], owner: Mapping[str, str]
) -> float:
    """Tokens a second for all requests at once. Every tenant has its own connection."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(AsyncClient(address, each, retry=None))
            for name, each in access.items()
        }
        # Opens the connections, and the server checks every key once.
        await asyncio.gather(
            *(clients[owner[task]].generate(task, text, max_new_tokens=1) for task, text in dict(requests).items())
        )
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(clients[owner[task]].generate(task, text, **PARAMETERS) for task, text in requests)
        )
        seconds = time.perf_counter() - began
    return _rate(sum(answer.summary.completion_tokens for answer in answers), seconds, requests)


def _rate(tokens: int, seconds: float, requests: list[tuple[str, str]]) -> float:
    """Tokens a second. Raises RuntimeError if many answers ended early: that is other work."""
    wanted = len(requests) * PARAMETERS["max_new_tokens"]
    if tokens < 0.9 * wanted:
        raise RuntimeError(f"{tokens} tokens instead of {wanted}")
    return tokens / seconds
