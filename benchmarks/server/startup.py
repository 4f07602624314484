"""`make bench`: the server's start-up time and memory."""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.adapters import random_tasks, write_random_adapter
from benchmarks.harness.native_server import native_server
from benchmarks.harness.processes import peak_bytes, resident_bytes
from mtlora.backbone import identify, resolve
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from server.cli.demo import ask_all

_GIB = 1 << 30
START_GOAL_S = 40.0
RESIDENT_GOAL_GIB = 4.0
# Numbers of tasks of one adapter that are compared.
FEW_TASKS, MANY_TASKS = 25, 1000
MANY_TASKS_GOAL = 1.05
# Requests to each server: enough to ask every task once.
_REQUESTS = MANY_TASKS
_NEW_TOKENS = 2


@dataclass(frozen=True)
class Cost:
    """One server's figures after its load. start_seconds: until SERVING. failed: requests without an answer."""

    start_seconds: float
    resident_bytes: int
    peak_bytes: int
    failed: int


def main() -> int:
    """Start servers, ask each every task, print the figures. Returns 1 if a goal is missed or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"))
    args = parser.parse_args()
    suite = load_suite("builtin")
    examples = [example for task in suite.tasks for example in suite.examples(task.id, "test", 4, 1)]
    shipped = measure(args.backbone, args.adapters, examples)
    with tempfile.TemporaryDirectory() as temporary:
        few, many = (measure_tasks(args.backbone, Path(temporary), count) for count in (FEW_TASKS, MANY_TASKS))
    resident = shipped.resident_bytes / _GIB
    # Compare both: the peak may be at the start and hide the memory of tasks.
    peak_ratio, end_ratio = many.peak_bytes / few.peak_bytes, many.resident_bytes / few.resident_bytes
    failed = sum(cost.failed for cost in (shipped, few, many))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "start_seconds": round(shipped.start_seconds, 1),
        "resident_gib": round(resident, 3),
        "by_tasks": {
            str(n): {"resident_gib": round(cost.resident_bytes / _GIB, 3), "peak_gib": round(cost.peak_bytes / _GIB, 3)}
            for n, cost in ((FEW_TASKS, few), (MANY_TASKS, many))
        },
        "many_over_few_tasks": {"resident": round(end_ratio, 4), "peak": round(peak_ratio, 4)},
        "failed": failed,
    }
    args.json.write_text(json.dumps(document) + "\n")
    print(f"bench: start-up to SERVING {shipped.start_seconds:.1f} s (goal {START_GOAL_S:.0f} s)")
    print(f"bench: resident, all processes, KV cache 1 GiB {resident:.2f} GiB (goal {RESIDENT_GOAL_GIB:.0f} GiB)")
    print(
        f"bench: memory, {MANY_TASKS} tasks of one adapter/{FEW_TASKS} tasks: peak {peak_ratio:.3f}, "
        f"resident after as many requests {end_ratio:.3f} (goal {MANY_TASKS_GOAL})"
    )
    missed = shipped.start_seconds > START_GOAL_S or resident > RESIDENT_GOAL_GIB
    missed |= max(peak_ratio, end_ratio) > MANY_TASKS_GOAL
    return int(failed > 0 or missed)


def measure(backbone: str, adapters: Path, examples: Sequence[Example]) -> Cost:
    """Start a server, ask it every example, and measure it before it stops."""
    with native_server(backbone=backbone, adapters=adapters, kv_cache_gib=1) as server:
        asked = asyncio.run(ask_all(server.address, examples))
        pid = server.process.pid
        failed = sum(each.answer is None for each in asked)
        return Cost(server.start_seconds, resident_bytes(pid), peak_bytes(pid), failed)


def measure_tasks(backbone: str, folder: Path, num_tasks: int) -> Cost:
    """`measure` with one random adapter of `num_tasks` tasks, asked in turn, with short answers."""
    adapters = folder / str(num_tasks)
    identity = identify(resolve(backbone))
    write_random_adapter(adapters / "random" / "1", identity, random_tasks(num_tasks, max_new_tokens=_NEW_TOKENS))
    examples = [Example(f"task-{i % num_tasks}", f"Question {i}:", "none") for i in range(_REQUESTS)]
    return measure(backbone, adapters, examples)


if __name__ == "__main__":
    raise SystemExit(main())
