"""The simulation against a real run: two server processes, a core each, calibrated and then loaded at random.

The servers are measured while both are loaded, in closed loops of several concurrencies; the model fitted to that then
predicts an open loop over both, round robin. Lengths of that run come from the calibration alone.
"""

import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.capacity.errors import CapacityError
from deploy.capacity.result import Answered, Level
from deploy.capacity.routing import RoundRobin
from deploy.capacity.service import ServiceModel, fit
from deploy.capacity.simulate import poisson, simulate
from mtlora.client import AsyncClient, Client
from mtlora.suite import load_suite
from mtlora.suite.base import Example

_READY = re.compile(r"serving on (?P<address>\S+),")
_LEVELS = (1, 4, 16, 32)
# Generated tokens of a request: stop strings are off, so that answers are as long as asked for.
_NEW_TOKENS = (8, 40)
_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Comparison:
    """Measured and simulated: requests a second, and p95 end to end in seconds."""

    model: ServiceModel
    levels: Sequence[Level] = field(repr=False)
    rate: float
    throughput: tuple[float, float]
    p95: tuple[float, float]

    @property
    def throughput_error(self) -> float:
        """Relative."""
        return abs(self.throughput[1] / self.throughput[0] - 1)

    @property
    def p95_error(self) -> float:
        """Relative."""
        return abs(self.p95[1] / self.p95[0] - 1)


def check(*, adapters: Path, seconds: float, utilisation: float, seed: int) -> Comparison:
    """Start two servers, calibrate, load, simulate. Raises CapacityError where a server does not start."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise CapacityError(f"found {len(cores)} core; two servers need one each")
    with _server(adapters, cores[0]) as first, _server(adapters, cores[1]) as second:
        return asyncio.run(_check((first, second), seconds, utilisation, seed))


async def _check(addresses: Sequence[str], seconds: float, utilisation: float, seed: int) -> Comparison:
    examples = _examples(addresses[0])
    rng = random.Random(seed)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(address)) for address in addresses]
        await asyncio.gather(*(_closed_loop(client, examples, 16, 32, rng) for client in clients))
        levels = []
        for in_flight in _LEVELS:
            requests = max(30, 4 * in_flight)
            both = await asyncio.gather(*(_closed_loop(c, examples, in_flight, requests, rng) for c in clients))
            levels += both
        model = fit(levels)
        lengths = [(a.prompt_tokens, a.completion_tokens) for level in levels for a in level.answered]
        prompt, completion = np.mean(lengths, axis=0)
        rate = utilisation * len(clients) * model.saturated_rate(prompt, completion)
        measured_throughput, measured_e2e = await _open_loop(clients, examples, rate, seconds, rng)
    requests_ = poisson(rate, 10 * seconds, tasks=1, adapters=1, lengths=lengths, seed=seed)
    outcome = simulate(requests_, len(addresses), model, RoundRobin(len(addresses)), warm_up=seconds / 5)
    return Comparison(
        model,
        levels,
        rate,
        (measured_throughput, outcome.throughput),
        (float(np.percentile(measured_e2e, 95)), outcome.percentiles(outcome.e2e)[1]),
    )


async def _closed_loop(
    client: AsyncClient, examples: Sequence[Example], in_flight: int, requests: int, rng: random.Random
) -> Level:
    waiting = [rng.choice(examples) for _ in range(requests)]
    answered: list[Answered] = []

    async def worker() -> None:
        while waiting:
            answered.append(await _ask(client, waiting.pop(), rng))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return Level(in_flight, len(answered) / (time.perf_counter() - began), tuple(answered))


async def _open_loop(
    clients: Sequence[AsyncClient], examples: Sequence[Example], rate: float, seconds: float, rng: random.Random
) -> tuple[float, list[float]]:
    """Requests finished a second, and end-to-end seconds from the intended send time, both after a fifth of the run."""
    warm_up = seconds / 5
    done: list[tuple[float, float]] = []
    asked: list[asyncio.Task[None]] = []
    began = time.perf_counter()

    async def one(at: float, client: AsyncClient) -> None:
        await _ask(client, rng.choice(examples), rng)
        done.append((at, time.perf_counter() - began))

    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        asked.append(asyncio.create_task(one(at, clients[len(asked) % len(clients)])))
    await asyncio.gather(*asked)
    in_time = sum(warm_up <= finished <= seconds for _, finished in done)
    return in_time / (seconds - warm_up), [finished - sent for sent, finished in done if sent >= warm_up]


async def _ask(client: AsyncClient, example: Example, rng: random.Random) -> Answered:
    began = time.perf_counter()
    answer = await client.generate(example.task_id, example.input, max_new_tokens=rng.randint(*_NEW_TOKENS), stop=[])
    summary: Any = answer.summary
    ttft = summary.timings.time_to_first_token.ToTimedelta().total_seconds()
    total = summary.timings.total.ToTimedelta().total_seconds()
    seconds = time.perf_counter() - began
    # What the server does not see of a request comes before its first token, to the client's eye.
    return Answered(ttft + seconds - total, seconds, summary.prompt_tokens, summary.completion_tokens)


def _examples(address: str) -> list[Example]:
    suite = load_suite("builtin")
    with Client(address) as client:
        served = {task.id for task in client.tasks()}
    found = [e for task in suite.tasks if task.id in served for e in suite.examples(task.id, "test", 8, 0)]
    if not found:
        raise CapacityError("the servers have no task of the built-in suite")
    return found


@contextlib.contextmanager
def _server(adapters: Path, core: int) -> Iterator[str]:
    """A server of this machine's on one core; gives its address."""
    command = [
        "taskset", "-c", str(core), sys.executable, "-m", "server", "serve", "--port", "0", "--metrics-port", "0",
        "--adapters", str(adapters), "--kv-cache-gib", "0.25", "--omp-threads-bind", str(core),
        "--no-enable-prefix-caching", "--log-level", "error",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        timer = threading.Timer(_START_TIMEOUT_S, process.terminate)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := _READY.search(line):
                    timer.cancel()
                    yield found["address"]
                    return
            log.seek(0)
            raise CapacityError(f"a server did not start: {log.read()[-500:].decode(errors='replace')}")
        finally:
            timer.cancel()
            process.terminate()
            process.wait(60)
