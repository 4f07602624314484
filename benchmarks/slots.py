"""`make bench-slots`: throughput and waiting times when there are more adapters than slots in the engine."""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.adapters import write_scaled_adapter
from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.percentile import p99
from mtlora.checkpoint.read import read_manifest
from mtlora.client import AsyncClient, Client, MetricsPage

IN_FLIGHT = 16


@dataclass(frozen=True)
class Result:
    requests_per_s: float
    ttft_s: list[float]


def main() -> int:
    """Compare as many adapters as slots with three times as many. Returns 1 if the ratio is below the goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slots", description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument(
        "--adapter", type=Path, default=Path("adapters/builtin/1"), help="the one to copy, with small changes"
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=48)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--goal", type=float, default=0.9, help="least ratio of requests a second")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.adapters):
            write_variant(args.adapter, Path(folder), number)
        with native_server(
            backbone=args.backbone, adapters=folder, adapter_slots=args.slots, max_num_seqs=IN_FLIGHT, kv_cache_gib=0.5,
            log_level="warning",
        ) as server:  # fmt: skip
            with server.client() as client:
                tasks = tasks_by_adapter(client)
            asyncio.run(ask(server.address, tasks[: args.slots], args.slots * 2))
            few = [asyncio.run(ask(server.address, tasks[: args.slots], args.requests))]
            many = asyncio.run(ask(server.address, tasks, args.requests))
            few.append(asyncio.run(ask(server.address, tasks[: args.slots], args.requests)))
            cold = cold_waits(server.metrics)
    base = statistics.mean(each.requests_per_s for each in few)
    ratio = many.requests_per_s / base
    print(f"{args.slots} adapters in {args.slots} slots: {base:.2f} requests/s, TTFT p99 {p99(few[-1].ttft_s):.2f} s")
    print(
        f"{args.adapters} adapters in {args.slots} slots: {many.requests_per_s:.2f} requests/s, "
        f"TTFT p99 {p99(many.ttft_s):.2f} s; {cold}"
    )
    print(f"bench: {args.adapters} adapters / {args.slots} in {args.slots} slots {ratio:.2f} (goal {args.goal})")
    return int(ratio < args.goal)


def write_variant(source: Path, folder: Path, number: int) -> None:
    """Write the adapter under another name, with other weights and task ids."""
    tasks = [
        task.model_copy(update={"id": f"t{number:03}_{task.id}"[:64], "template": "{input}\nAnswer:"})
        for task in read_manifest(source).tasks
    ]
    write_scaled_adapter(source, folder / f"adapter{number:03}" / "1", 1 - number / 1000, tasks)


async def ask(address: str, tasks: Sequence[str], number: int) -> Result:
    """Ask `number` questions, `IN_FLIGHT` at a time, of tasks drawn by a Zipf law."""
    rng = random.Random(len(tasks))
    weights = [1 / (rank + 1) for rank in range(len(tasks))]
    ttft_s: list[float] = []
    async with AsyncClient(address) as client:

        async def generate(task: str) -> None:
            text = " ".join(rng.choices(["one", "two", "three", "four"], k=60))
            answer = await client.generate(task, text, max_new_tokens=32, stop=[], timeout=300)
            ttft_s.append(answer.summary.timings.time_to_first_token.ToTimedelta().total_seconds())

        began = time.monotonic()
        await closed_loop(rng.choices(tasks, weights, k=number), IN_FLIGHT, generate)
        return Result(number / (time.monotonic() - began), ttft_s)


def tasks_by_adapter(client: Client) -> list[str]:
    """One task of each adapter, in the order of the adapters' names."""
    task_of = {task.adapter_name: task.id for task in client.tasks()}
    return [task_of[adapter] for adapter in sorted(task_of)]


def cold_waits(metrics: str) -> str:
    """How many requests waited for their adapter, and how long on average."""
    page = MetricsPage.fetch(metrics)
    count, total = (page.value(f"mtlora_adapter_cold_seconds_{name}") for name in ("count", "sum"))
    return f"{count:.0f} requests waited for their adapter, {1e3 * total / max(count, 1):.0f} ms on average"


if __name__ == "__main__":
    raise SystemExit(main())
