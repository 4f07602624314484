"""`make bench`: what the server costs before it answers anything faster: start-up time and resident memory."""

import argparse
import asyncio
import json
from pathlib import Path

import psutil

from mtlora.suite import load_suite
from server.demo import ask_all
from server.process import ServerProcess

_GIB = 1 << 30
START_GOAL_S = 40.0
RESIDENT_GOAL_GIB = 4.0


def main() -> int:
    """Start the server, load it once with every task, print both figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"))
    args = parser.parse_args()
    suite = load_suite("builtin")
    examples = [example for task in suite.tasks for example in suite.examples(task.id, "test", 4, 1)]
    with ServerProcess(backbone=args.backbone, adapters=args.adapters, kv_cache_gib=1) as server:
        asked = asyncio.run(ask_all(server.address, examples))
        resident = resident_bytes(server.process.pid) / _GIB
        start = server.start_seconds
    failed = sum(each.answer is None for each in asked)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"start_seconds": round(start, 1), "resident_gib": round(resident, 3), "failed": failed}) + "\n"
    )
    print(f"bench: start-up to SERVING {start:.1f} s (goal {START_GOAL_S:.0f} s)")
    print(f"bench: resident, all processes, KV cache 1 GiB {resident:.2f} GiB (goal {RESIDENT_GOAL_GIB:.0f} GiB)")
    return int(failed > 0 or start > START_GOAL_S or resident > RESIDENT_GOAL_GIB)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants; what they share counts in each: an upper bound."""
    root = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


if __name__ == "__main__":
    raise SystemExit(main())
