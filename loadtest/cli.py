"""`mtlora-loadtest`: load a running server and report what it did."""

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.closed_loop import Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all answered, 1 some request failed, 2 wrong use or no server."""
    parser = argparse.ArgumentParser("mtlora-loadtest", description="A closed loop over a server's built-in tasks.")
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--requests", type=int, default=250, help="in all, spread evenly over the tasks")
    parser.add_argument("--in-flight", type=int, default=64, help="requests at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write settings and every outcome")
    args = parser.parse_args(argv)
    if args.requests < 1 or args.in_flight < 1:
        parser.error("--requests and --in-flight must be at least 1")
    from loadtest.closed_loop import run
    from mtlora.client import Client, ServerError
    from mtlora.suite import load_suite

    try:
        with Client(args.address) as client:
            served = {task.id for task in client.tasks()}
    except ServerError as error:
        print(f"mtlora-loadtest: {args.address}: {error}", file=sys.stderr)
        return 2
    suite = load_suite("builtin")
    tasks = [task.id for task in suite.tasks if task.id in served]
    if not tasks:
        print(f"mtlora-loadtest: {args.address} serves no task of the built-in suite", file=sys.stderr)
        return 2
    each, more = divmod(args.requests, len(tasks))
    examples = [
        example
        for i, task_id in enumerate(tasks)
        for example in suite.examples(task_id, "test", each + (i < more), args.seed)
    ]
    outcomes, seconds = asyncio.run(run(args.address, examples, in_flight=args.in_flight, seed=args.seed))
    _report(outcomes, seconds)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        document = {"settings": settings, "seconds": seconds, "outcomes": [asdict(o) for o in outcomes]}
        args.json.write_text(json.dumps(document) + "\n")
    return int(any(outcome.status != "OK" for outcome in outcomes))


def _report(outcomes: "Sequence[Outcome]", seconds: float) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    ok = [outcome for outcome in outcomes if outcome.status == "OK"]
    table = Table("latency, ms", "p50", "p95", "p99", title=f"{len(outcomes)} requests in {seconds:.1f} s")
    for name, values in (
        ("time to first token", [o.time_to_first_token_s for o in ok]),
        ("end to end", [o.seconds for o in ok]),
    ):
        if values:
            table.add_row(name, *(f"{1000 * q:.0f}" for q in np.percentile(values, (50, 95, 99))))
    console = Console()
    console.print(table)
    statuses = ", ".join(f"{name} {count}" for name, count in Counter(o.status for o in outcomes).most_common())
    tokens = sum(o.completion_tokens for o in ok)
    console.print(
        f"{len(ok) / seconds:.2f} requests/s, {tokens / seconds:.0f} tokens/s out; statuses: {statuses}; "
        f"right answers {sum(o.correct for o in ok)} of {len(ok)}"
    )
