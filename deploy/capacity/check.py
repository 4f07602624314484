"""Compares the simulation with a real run: two servers, one core each, are calibrated and then get random load.

The servers are measured while both are loaded, in closed loops of several concurrencies. The fitted model then predicts
two new measurements: the throughput of full servers, and the latencies of an open loop over both, round robin. The
lengths for that loop come only from the calibration.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.asking import closed_loop, open_loop
from benchmarks.harness.environment import on_cores, usable_cores
from benchmarks.harness.native_server import native_server
from deploy.capacity import CapacityError
from deploy.capacity.result import Answered, Level
from deploy.capacity.routing import RoundRobin
from deploy.capacity.service import ServiceModel, fit
from deploy.capacity.simulate import poisson, simulate
from mtlora.client import AsyncClient, Client
from mtlora.suite import load_suite
from mtlora.suite.base import Example

_LEVELS = (1, 4, 16, 32)
# Requests to full servers, as a multiple of those under way.
_FULL_TIMES = 6
# Generated tokens of a request, from and to. Stop strings and types are off, so answers have the length asked for.
_NEW_TOKENS = (8, 40)
_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Comparison:
    """Measured and by the model. saturated: requests a second of full servers. p95: seconds end to end at `rate`."""

    model: ServiceModel
    levels: Sequence[Level] = field(repr=False)
    rate: float
    saturated: tuple[float, float]
    p95: tuple[float, float]


def check(*, adapters: Path, seconds: float, utilisation: float, seed: int) -> Comparison:
    """Start two servers, calibrate, load, simulate. Raises ServerFailedError if a server does not start."""
    cores = usable_cores()
    if len(cores) < 2:
        raise CapacityError(f"found {len(cores)} core; two servers need one each")
    with _server(adapters, cores[0]) as first, _server(adapters, cores[1]) as second:
        return asyncio.run(_check((first, second), seconds, utilisation, seed))


async def _check(addresses: Sequence[str], seconds: float, utilisation: float, seed: int) -> Comparison:
    examples = _examples(addresses[0])
    rng = random.Random(seed)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(address, retry=None)) for address in addresses]
        await asyncio.gather(*(_closed_loop(client, examples, 16, 32, rng) for client in clients))
        levels = []
        for in_flight in _LEVELS:
            requests = max(30, 4 * in_flight)
            levels += await asyncio.gather(*(_closed_loop(c, examples, in_flight, requests, rng) for c in clients))
        model = fit(levels)
        # More requests than a step runs.
        full = 3 * model.max_num_seqs // 2
        held_out = await asyncio.gather(
            *(_closed_loop(c, examples, full, _FULL_TIMES * full, rng, steady=True) for c in clients)
        )
        lengths = [(a.prompt_tokens, a.completion_tokens) for level in levels for a in level.answered]
        prompt, completion = np.mean(lengths, axis=0)
        rate = utilisation * len(clients) * model.saturated_rate(prompt, completion)
        measured_e2e = await _open_loop(clients, examples, rate, seconds, rng)
    requests_ = poisson(rate, 10 * seconds, tasks=1, adapters=1, lengths=lengths, seed=seed)
    outcome = simulate(requests_, len(addresses), model, RoundRobin(len(addresses)), warm_up=seconds / 5)
    return Comparison(
        model,
        levels,
        rate,
        saturated(model, held_out),
        (float(np.percentile(measured_e2e, 95)), outcome.percentiles(outcome.e2e)[1]),
    )


def saturated(model: ServiceModel, levels: Sequence[Level]) -> tuple[float, float]:
    """Requests a second of some full servers together, measured and by the model, for the lengths of the answers."""
    lengths = [[(a.prompt_tokens, a.completion_tokens) for a in level.answered] for level in levels]
    return (
        sum(level.throughput for level in levels),
        sum(model.saturated_rate(*np.mean(each, axis=0)) for each in lengths),
    )


async def _closed_loop(
    client: AsyncClient,
    examples: Sequence[Example],
    in_flight: int,
    requests: int,
    rng: random.Random,
    *,
    steady: bool = False,
) -> Level:
    """A level. steady: its throughput counts only the time while all places were taken."""
    answered: list[Answered] = []
    ends: list[float] = []

    async def ask(example: Example) -> None:
        answered.append(await _ask(client, example, rng))
        ends.append(time.perf_counter())

    began = time.perf_counter()
    await closed_loop(rng.choices(examples, k=requests), in_flight, ask)
    throughput = steady_rate(ends, in_flight) if steady else len(answered) / (time.perf_counter() - began)
    return Level(in_flight=in_flight, throughput=throughput, answered=tuple(answered))


def steady_rate(ends: Sequence[float], in_flight: int) -> float:
    """Ends a second between the first `in_flight` ones, while the loop fills, and the last, while it empties."""
    steady = ends[in_flight - 1 : len(ends) - in_flight + 1]
    return (len(steady) - 1) / (steady[-1] - steady[0])


async def _open_loop(
    clients: Sequence[AsyncClient], examples: Sequence[Example], rate: float, seconds: float, rng: random.Random
) -> list[float]:
    """Seconds from when each request was due to its answer. The first fifth of the run is warm-up and left out."""
    warm_up = seconds / 5
    gaps: list[float] = []
    while sum(gaps) < seconds:
        gaps.append(rng.expovariate(rate))
    arrivals = itertools.accumulate(gaps[:-1], initial=0.0)
    found: list[float] = []

    async def ask(request: tuple[float, AsyncClient]) -> None:
        arrival, client = request
        await _ask(client, rng.choice(examples), rng)
        if arrival >= warm_up:
            found.append(time.perf_counter() - began - arrival)

    began = time.perf_counter()
    await open_loop(zip(arrivals, itertools.cycle(clients), strict=False), gaps, ask)
    return found


async def _ask(client: AsyncClient, example: Example, rng: random.Random) -> Answered:
    began = time.perf_counter()
    length = rng.randint(*_NEW_TOKENS)
    answer = await client.generate(example.task_id, example.input, max_new_tokens=length, stop=[], free=True)
    summary: Any = answer.summary
    ttft = summary.timings.time_to_first_token.ToTimedelta().total_seconds()
    total = summary.timings.total.ToTimedelta().total_seconds()
    seconds = time.perf_counter() - began
    # Count time outside the server as time before the first token.
    return Answered(
        ttft=ttft + seconds - total, seconds=seconds, prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
    )  # fmt: skip


def _examples(address: str) -> list[Example]:
    suite = load_suite("builtin")
    with Client(address, retry=None) as client:
        served = {task.id for task in client.tasks()}
    found = [e for task in suite.tasks if task.id in served for e in suite.examples(task.id, "test", 8, 0)]
    if not found:
        raise CapacityError("the servers have no task of the built-in suite")
    return found


@contextlib.contextmanager
def _server(adapters: Path, core: int) -> Iterator[str]:
    """The address of a server that runs on one core."""
    with contextlib.ExitStack() as stack:
        with on_cores([core]):
            server = stack.enter_context(
                native_server(
                    adapters=adapters, kv_cache_gib=0.25, omp_threads_bind=core, enable_prefix_caching=False,
                    log_level="error", timeout=_START_TIMEOUT_S,
                )
            )  # fmt: skip
        yield server.address
