"""`make bench-front`: the server's own cost beside vLLM's own HTTP server, with the same plugin and requests.

Each server starts its engine with its own defaults. On CPUs, ours runs its one rank in the engine's process with blocks
of 32 tokens; vLLM's server runs it in a further process with blocks of 128. So the engine's settings affect throughput,
but not cost. `--same-engine` gives both vLLM's executor and our blocks.

Both serve the built-in tasks of one adapter. In every round, each gets the same requests for whole answers, 16 in
flight, while the other is halted. Cost is the processor time per request of the process that speaks gRPC or HTTP,
including its threads but not the engine's processes. Ratios are geometric means over rounds.

On some machines, the server that was started first took a quarter more processor time, even if both were equal. So each
is started first in half of the rounds.
"""

import argparse
import asyncio
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.processes import cpu_seconds, halted
from benchmarks.harness.versions import newest_version
from benchmarks.harness.vllm_server import vllm_server
from mtlora.backbone import resolve
from mtlora.checkpoint.format import TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.cli.output import print_table
from mtlora.client import AsyncClient
from mtlora.suite import load_suite
from mtlora.suite.base import Example, Suite
from mtlora.vllm_cpu.precision import engine_dtype
from server.engine.launch import CPU_BLOCK_TOKENS

IN_FLIGHT = 16
OURS, THEIRS = "mtlora-server", "vllm serve"
MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 1024
# Requests to each server in the warm-up round, which does not count.
_WARM_UP_REQUESTS = 64
_EXAMPLES_PER_TASK = 40
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)

# Asks one example and returns the number of tokens in its answer.
Ask = Callable[[Example], Awaitable[int]]


@dataclass(frozen=True)
class Side:
    """One of the two servers. pid: the process that speaks to clients, whose children are the engine's."""

    name: str
    pid: int
    connect: Callable[[], AbstractAsyncContextManager[Ask]]


@dataclass(frozen=True)
class Measured:
    """A server's figures in one round. front_s, asker_s: processor time of its front end, and of the client."""

    seconds: float
    requests: int
    tokens: int
    front_s: float
    asker_s: float

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def cost_s(self) -> float:
        """Processor time a request of the front end."""
        return self.front_s / self.requests


def main() -> int:
    """Start both servers, ask them in turn, print a table and the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server.front", description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapter", type=Path, help="default: the newest version of the shipped adapter")
    parser.add_argument("--rounds", type=int, default=6, help="an even number")
    parser.add_argument("--seconds", type=float, default=18.0, help="for each server in a round, about")
    parser.add_argument("--same-engine", action="store_true", help="the same executor and blocks on both sides")
    args = parser.parse_args()
    folder = resolve(args.backbone)
    adapter = (args.adapter or newest_version(Path("adapters/builtin"))).resolve()
    suite = load_suite("builtin")
    manifest = read_manifest(adapter)
    tasks = {task.id: manifest.task(task.id) for task in suite.tasks}
    engine: dict[str, Any] = {
        "dtype": engine_dtype("auto", folder), "max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN,
        "enforce_eager": True,
    }  # fmt: skip

    ours: dict[str, Any] = {"distributed_executor_backend": "mp"} if args.same_engine else {}
    theirs: dict[str, Any] = ours | {"block_size": CPU_BLOCK_TOKENS} if args.same_engine else {}
    print(f"engines: {f'the same, {theirs}' if args.same_engine else 'by the defaults of their servers'}", flush=True)

    def start_ours(stack: ExitStack) -> Side:
        # Serve this version alone: a newer version in the folder would be served instead.
        served = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.copytree(adapter, served / adapter.parent.name / adapter.name)
        # Do not watch for hangs: the engine does not answer while it is halted.
        settings = {"backbone": args.backbone, "adapters": served, "engine_hang_s": 3600}
        server = stack.enter_context(native_server(**settings, **engine, **ours))
        return Side(OURS, server.process.pid, lambda: _grpc(server.address))

    def start_theirs(stack: ExitStack) -> Side:
        loras = {"enable_lora": True, "max_loras": MAX_NUM_SEQS, "max_cpu_loras": MAX_NUM_SEQS}
        server = stack.enter_context(vllm_server(folder, dict.fromkeys(tasks, adapter), **loras, **engine, **theirs))
        return Side(THEIRS, server.pid, lambda: _http(server.url, tasks))

    rounds: list[Mapping[str, Measured]] = []
    for start in ((start_ours, start_theirs), (start_theirs, start_ours)):
        with ExitStack() as stack:
            sides = [each(stack) for each in start]
            warm_up = run_round(sides, suite, 0, _WARM_UP_REQUESTS)
            requests = max(IN_FLIGHT, int(args.seconds * min(each.requests_per_s for each in warm_up.values())))
            rounds += [run_round(sides, suite, number, requests) for number in range(1, args.rounds // 2 + 1)]
    report({name: [each[name] for each in rounds] for name in (OURS, THEIRS)})
    return 0


def run_round(sides: Sequence[Side], suite: Suite, number: int, requests: int) -> Mapping[str, Measured]:
    """Measure both servers with the same requests, by name. The order changes from round to round."""
    examples = [each for task in suite.tasks for each in suite.examples(task.id, "test", _EXAMPLES_PER_TASK, number)]
    random.Random(number).shuffle(examples)
    asked = list(itertools.islice(itertools.cycle(examples), IN_FLIGHT + requests))
    measured = {}
    for side, other in (sides, sides[::-1])[:: 1 if number % 2 else -1]:
        with halted(other.pid):
            measured[side.name] = asyncio.run(measure(side, asked))
    for name, each in measured.items():
        print(f"round {number}: {name} {each.requests_per_s:.2f} requests/s, {1e3 * each.cost_s:.2f} ms", flush=True)
    return measured


async def measure(side: Side, examples: Sequence[Example]) -> Measured:
    """Ask every example in a closed loop. The first `IN_FLIGHT` open the connections and do not count."""
    answers: list[int] = []

    async with side.connect() as ask:

        async def count(example: Example) -> None:
            answers.append(await ask(example))

        def counters() -> tuple[float, int, int, float, float]:
            return time.perf_counter(), len(answers), sum(answers), cpu_seconds(side.pid), time.process_time()

        await closed_loop(examples[:IN_FLIGHT], IN_FLIGHT, count)
        before = counters()
        await closed_loop(examples[IN_FLIGHT:], IN_FLIGHT, count)
        after = counters()
    return Measured(*(late - early for early, late in zip(before, after, strict=True)))  # type: ignore[arg-type]


@asynccontextmanager
async def _grpc(address: str) -> AsyncIterator[Ask]:
    async with AsyncClient(address, retry=None) as client:

        async def ask(example: Example) -> int:
            answer = await client.generate(example.task_id, example.input)
            return int(answer.summary.completion_tokens)

        yield ask


@asynccontextmanager
async def _http(url: str, tasks: Mapping[str, TaskEntry]) -> AsyncIterator[Ask]:
    async with aiohttp.ClientSession(url, timeout=_NO_TIMEOUT, raise_for_status=True) as session:

        async def ask(example: Example) -> int:
            task = tasks[example.task_id]
            body = {
                "model": task.id, "prompt": task.render(example.input), "stop": list(task.stop),
                "max_tokens": task.max_new_tokens, "temperature": 0,
            }  # fmt: skip
            async with session.post("/v1/completions", json=body) as reply:
                return int((await reply.json())["usage"]["completion_tokens"])

        yield ask


def report(measured: Mapping[str, Sequence[Measured]]) -> None:
    """Print medians of both servers, ours first, and the geometric means of the rounds' ratios."""

    def median(value: Callable[[Measured], float], of: Sequence[Measured]) -> float:
        return statistics.median(map(value, of))

    print_table(
        f"{IN_FLIGHT} requests in flight, medians of {len(next(iter(measured.values())))} rounds",
        ("server", "requests/s", "front end, ms a request", "tokens an answer", "asker, ms a request", "requests"),
        [
            (
                name,
                f"{median(lambda t: t.requests_per_s, each):.2f}",
                f"{1e3 * median(lambda t: t.cost_s, each):.2f}",
                f"{median(lambda t: t.tokens / t.requests, each):.2f}",
                f"{1e3 * median(lambda t: t.asker_s / t.requests, each):.2f}",
                sum(t.requests for t in each),
            )
            for name, each in measured.items()
        ],
    )
    rounds = list(zip(*measured.values(), strict=True))
    cost = statistics.geometric_mean(ours.cost_s / theirs.cost_s for ours, theirs in rounds)
    throughput = statistics.geometric_mean(ours.requests_per_s / theirs.requests_per_s for ours, theirs in rounds)
    print(f"bench-front: cost/vllm-serve {cost:.2f}, throughput/vllm-serve {throughput:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
