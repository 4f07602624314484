"""`python -m deploy.capacity`: fit a service model, plan for a demand, write the report, check on real servers."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from deploy.capacity import CapacityError
from deploy.capacity.check import Comparison, check
from deploy.capacity.placement import compare, page
from deploy.capacity.plan import MAX_REPLICAS, MEMORY_GIB, Demand, make_plan
from deploy.capacity.report import report
from deploy.capacity.result import document, read_levels
from deploy.capacity.routing import ROUTERS
from deploy.capacity.service import ServiceModel, fit, read_model
from mtlora.client import ServerError
from mtlora.errors import describe

_THROUGHPUT_GOAL, _P95_GOAL = 0.10, 0.20


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 impossible demand or goal missed, 2 wrong use."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (ValidationError, CapacityError, ServerError) as error:
        message = describe(error) if isinstance(error, ValidationError) else error
        print(f"capacity: {message}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.capacity", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fitting = commands.add_parser("fit", help="a service model from load tests at several concurrencies")
    fitting.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="JSON of mtlora-loadtest")
    fitting.add_argument("--max-num-seqs", type=int, default=64, help="the server's; default: %(default)s")
    fitting.add_argument("--out", type=Path, required=True, metavar="MODEL")
    fitting.set_defaults(run=_fit)

    planning = commands.add_parser("plan", help="replicas, slots and memory for a demand")
    _add_source(planning)
    planning.add_argument("--tasks", type=int, required=True, metavar="T")
    planning.add_argument("--adapters", type=int, required=True, metavar="A")
    planning.add_argument("--rate", type=float, required=True, metavar="R", help="requests a second")
    planning.add_argument("--p95-ttft", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    planning.add_argument("--memory-gib", type=float, default=MEMORY_GIB, help="of a replica; default: %(default)s")
    planning.add_argument("--routing", choices=sorted(ROUTERS), default="adapter-aware")
    planning.add_argument("--max-replicas", type=int, default=MAX_REPLICAS, help="default: %(default)s")
    planning.set_defaults(run=_plan)

    reporting = commands.add_parser("report", help="write deploy/capacity.md")
    _add_source(reporting)
    reporting.add_argument("--out", type=Path, default=Path("deploy/capacity.md"))
    reporting.set_defaults(run=_report)

    placing = commands.add_parser("place", help="placement by adapter against round robin; write deploy/placement.md")
    placing.add_argument(
        "--model", type=Path, default=Path(__file__).with_name("model.json"), help="default: %(default)s"
    )
    placing.add_argument("--out", type=Path, default=Path("deploy/placement.md"))
    placing.set_defaults(run=_place)

    checking = commands.add_parser("check", help="the simulation against two real server processes")
    checking.add_argument("--adapters", type=Path, default=Path("adapters"))
    checking.add_argument("--seconds", type=float, default=120.0, help="seconds of load; default: %(default)s")
    checking.add_argument(
        "--utilisation", type=float, default=0.5,
        help="offered load, as a share of what both can answer; default: %(default)s",
    )  # fmt: skip
    checking.add_argument("--seed", type=int, default=0)
    checking.add_argument("--out", type=Path, metavar="DIR", help="write the calibration's results and the comparison")
    checking.set_defaults(run=_check)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a model that `fit` wrote; default: fit one to the results")
    parser.add_argument(
        "--results", type=Path, nargs="+", required=True, metavar="RESULT",
        help="JSON of mtlora-loadtest --outcomes, closed loops at two concurrencies or more; also gives the lengths",
    )  # fmt: skip


def _source(options: argparse.Namespace) -> tuple[ServiceModel, list[tuple[int, int]]]:
    """The service model, and the (prompt, completion) tokens of every request in the results."""
    levels = read_levels(options.results)
    lengths = [(each.prompt_tokens, each.completion_tokens) for level in levels for each in level.answered]
    return read_model(options.model) if options.model else fit(levels), lengths


def _fit(options: argparse.Namespace) -> int:
    model = fit(read_levels(options.results), max_num_seqs=options.max_num_seqs)
    options.out.write_text(json.dumps(asdict(model), indent=1) + "\n")
    print(f"capacity: {options.out}: {model}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    model, lengths = _source(options)
    demand = Demand(tasks=options.tasks, adapters=options.adapters, rate=options.rate, p95_ttft=options.p95_ttft)
    plan = make_plan(
        demand, model, lengths, memory_gib=options.memory_gib, router=options.routing,
        max_replicas=options.max_replicas,
    )  # fmt: skip
    made, ttft = plan.footprint, plan.outcome.percentiles(plan.outcome.ttft)
    print(f"replicas            {plan.replicas}")
    print(f"slots a replica     {made.slots}")
    print(
        f"memory a replica    {made.total:.2f} GiB: backbone {made.backbone:.2f}, KV cache {made.kv_cache:.2f}, "
        f"adapters {made.adapters:.2f} ({made.resident} of {demand.adapters}), tasks {made.tasks:.2f}"
    )
    print(f"requests/s          {plan.outcome.throughput:.1f} of {demand.rate:g}")
    print(f"TTFT p50, p95, p99  {', '.join(f'{1e3 * each:.0f}' for each in ttft)} ms")
    return 0


def _report(options: argparse.Namespace) -> int:
    model, lengths = _source(options)
    names = " ".join(map(str, options.results))
    # `check` writes both files.
    beside = options.results[0].with_name("comparison.json")
    compared = [each.name for each in options.results] == ["calibration.json"] and beside.exists()
    comparison = json.loads(beside.read_text()) if compared else None
    command = f"python -m deploy.capacity report --results {names}"
    options.out.write_text(report(model, lengths, command, comparison))
    print(f"capacity: wrote {options.out}")
    return 0


def _place(options: argparse.Namespace) -> int:
    options.out.write_text(page(compare(read_model(options.model)), "python -m deploy.capacity place"))
    print(f"capacity: wrote {options.out}")
    return 0


def _check(options: argparse.Namespace) -> int:
    found = check(
        adapters=options.adapters, seconds=options.seconds, utilisation=options.utilisation, seed=options.seed
    )
    if options.out:
        _write(options.out, found)
    print(f"model {found.model}")
    print(
        f"two full servers, a core each: measured {found.saturated[0]:.2f}, by the model {found.saturated[1]:.2f} "
        "requests/s"
    )
    print(
        f"round robin, {found.rate:.2f} requests/s offered: p95 measured {found.p95[0]:.3f}, simulated "
        f"{found.p95[1]:.3f} s"
    )
    throughput_error, p95_error = (abs(said / measured - 1) for measured, said in (found.saturated, found.p95))
    met = throughput_error <= _THROUGHPUT_GOAL and p95_error <= _P95_GOAL
    print(f"capacity: throughput off by {throughput_error:.0%}, p95 by {p95_error:.0%}: {'met' if met else 'MISSED'}")
    return int(not met)


def _write(folder: Path, found: Comparison) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(document(found.levels)) + "\n")
    both = {"model": asdict(found.model), "rate": found.rate, "saturated": found.saturated, "p95_s": found.p95}
    (folder / "comparison.json").write_text(json.dumps(both, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
