"""`mtlora-loadtest`: load a server, find its knee, compare results. Imports what a command needs, when it needs it."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from loadtest.session import Session
    from loadtest.settings import Settings

PROGRAM = "mtlora-loadtest"
_OUT = Path("out/loadtest")
# A generator that is later than this has measured itself; a server, less than there was.
_LATE_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 requests lost or answers wrong, 2 wrong use or no server, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.command_line = [PROGRAM, *arguments]
    try:
        return int(options.run(options))
    except LoadTestError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="Load a server and say how it did.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="one load, open or closed loop, against a running server"))
    _add_knee(commands.add_parser("knee", help="raise the load until the service level breaks"))
    _add_all(commands.add_parser("all", help="start a server; its knee, a closed loop there, the engine in process"))
    _add_report(commands.add_parser("report", help="write a result's report again"))
    _add_compare(commands.add_parser("compare", help="two results against each other"))
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load: one of --rate, --in-flight, --trace")
    load.add_argument("--rate", type=float, metavar="R", help="open loop: Poisson arrivals, R requests/s on average")
    load.add_argument("--in-flight", type=int, metavar="N", help="closed loop: N requests under way at all times")
    load.add_argument("--trace", type=Path, metavar="FILE", help='open loop: JSONL, {"at": SECONDS, "task"} a line')
    load.add_argument("--speed", type=float, metavar="X", help="play the trace X times as fast")
    load.add_argument("--duration", type=float, metavar="S", help="seconds that count; default: 30, a trace's own")
    load.add_argument("--requests", type=int, metavar="N", help="closed loop: end after N requests, all of which count")
    load.add_argument("--warm-up", type=float, metavar="S", help="seconds left out at the start; default: 3, trace: 0")
    _add_server(parser)
    _add_common(parser)
    parser.set_defaults(run=_run)


def _add_knee(parser: argparse.ArgumentParser) -> None:
    _add_ramp(parser)
    _add_server(parser)
    _add_common(parser)
    parser.set_defaults(run=_knee)


def _add_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="default", help="default: %(default)s")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="against the engine; default: %(default)s")
    _add_ramp(parser)
    _add_common(parser)
    parser.set_defaults(run=_all)


def _add_ramp(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ramp")
    group.add_argument("--start-rate", type=float, metavar="R", help="requests/s of the first step; default: 4")
    group.add_argument("--growth", type=float, metavar="X", help="factor from step to step; default: 2")
    group.add_argument("--max-rate", type=float, metavar="R", help="no step goes beyond it; default: 10000")
    group.add_argument("--resolution", type=float, metavar="X", help="how near the knee is found; default: 0.1")
    group.add_argument("--step", type=float, metavar="S", help="seconds of a step that count; default: 12")
    group.add_argument("--warm-up", type=float, metavar="S", help="seconds before them; default: 3")


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--address", metavar="HOST:PORT", help="default: 127.0.0.1:50051")
    group.add_argument("--metrics", metavar="URL", help="the server's metrics page, read while the test runs")
    group.add_argument("--tls", action="store_true", default=None, help="with the system's root certificates")
    group.add_argument("--tls-root", type=Path, metavar="PEM", help="TLS with these root certificates")
    group.add_argument("--tls-certificate", type=Path, metavar="PEM", help="the client's certificate")
    group.add_argument("--tls-key", type=Path, metavar="PEM", help="the client's key")
    group.add_argument("--tls-server-name", metavar="NAME", help="the name in the server's certificate")
    group.add_argument("--tenants", type=Path, metavar="FILE", help="NAME KEY a line: who asks, with which API key")


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--tasks", metavar="A,B", help="ask these alone; default: all that have inputs")
    mixes = "uniform, zipf:S (in the order of --tasks) or hot:NAME=SHARE"
    group.add_argument("--task-mix", metavar="MIX", help=f"{mixes}; default: uniform")
    group.add_argument("--tenant-mix", metavar="MIX", help="the same over tenants")
    group.add_argument("--suite", metavar="NAME|DIR", help="builtin, or a folder in BIG-Bench Hard's layout")
    group.add_argument("--examples-per-task", type=int, metavar="N", help="distinct inputs a task; default: 200")
    group.add_argument("--prompts", type=Path, metavar="FILE", help='JSONL, {"task", "input", "target"} a line')
    group.add_argument("--prompt-words", metavar="N|A-B", help="random words instead of examples")
    group.add_argument("--new-tokens", metavar="N|A-B", help="length of answers, stop strings off; default: the task's")
    group.add_argument("--seed", type=int, metavar="N", help="of arrivals, mix and inputs; default: 0")
    group.add_argument("--timeout", type=float, metavar="S", help="a request's deadline; default: 60")
    group.add_argument("--unary", action="store_true", default=None, help="Generate instead of GenerateStream")
    group.add_argument("--processes", type=int, metavar="N", help="share the load among N processes; default: 1")
    group = parser.add_argument_group("judgement")
    group.add_argument("--slo-ttft", type=float, metavar="S", help="service level, first token; default: 1")
    group.add_argument("--slo-e2e", type=float, metavar="S", help="service level, whole answer; default: 3")
    group.add_argument(
        "--check", choices=("reply", "alone", "exact"),
        help="what makes an answer wrong: reply, it is incomplete or another's; alone, also where it is neither exact "
        "nor what the server answers to the same input alone (default); exact, wherever it is not the exact answer",
    )  # fmt: skip
    group.add_argument("--tie", type=float, metavar="NATS", help="tokens this near are a tie; default: 0.5")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="result.json and report.html; %(default)s")
    group.add_argument("--outcomes", action="store_true", default=None, help="keep every request in the result")
    group.add_argument("--no-live", action="store_true", help="plain lines on a terminal too")


def _settings(options: argparse.Namespace) -> "Settings":
    from loadtest.settings import Objective, Range, Settings, Target, WorkloadSettings, make

    def given(name: str) -> Any:
        return getattr(options, name, None)

    def length(name: str) -> Range | None:
        text = given(name)
        try:
            return None if text is None else Range.parse(text)
        except ValueError as error:
            raise LoadTestError(f"--{name.replace('_', '-')}: {error}") from None

    target = make(
        Target, address=given("address"), metrics=given("metrics"), tls=given("tls"), tls_root=given("tls_root"),
        tls_certificate=given("tls_certificate"), tls_key=given("tls_key"), tls_server_name=given("tls_server_name"),
        tenants=given("tenants"), timeout_s=options.timeout, unary=options.unary,
    )  # fmt: skip
    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip()) if options.tasks else None
    workload = make(
        WorkloadSettings, tasks=tasks, task_mix=options.task_mix, tenant_mix=options.tenant_mix, suite=options.suite,
        examples_per_task=options.examples_per_task, prompts=options.prompts, prompt_words=length("prompt_words"),
        new_tokens=length("new_tokens"), seed=options.seed,
    )  # fmt: skip
    objective = make(Objective, ttft_s=options.slo_ttft, e2e_s=options.slo_e2e)
    return make(
        Settings, target=target, workload=workload, objective=objective, processes=options.processes,
        check=options.check, tie_nats=options.tie, outcomes=options.outcomes,
    )  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    from loadtest.settings import Load, make

    if options.rate is options.in_flight is options.trace is None:
        raise LoadTestError("no load: allowed is one of --rate, --in-flight and --trace")
    duration, warm_up = options.duration, options.warm_up
    if options.trace is not None:
        warm_up = 0.0 if warm_up is None else warm_up
    elif duration is None and options.requests is None:
        duration = 30.0
    load = make(
        Load, rate=options.rate, in_flight=options.in_flight, trace=options.trace, speed=options.speed,
        duration_s=duration, requests=options.requests, warm_up_s=warm_up,
    )  # fmt: skip

    async def work(session: "Session") -> int:
        phase = await session.run(load)
        if not session.over:
            await session.check()
        _print_phase(session, phase)
        return session.finish()

    return asyncio.run(_in_session(_settings(options), options, work))


def _knee(options: argparse.Namespace) -> int:
    ramp = _ramp(options)

    async def work(session: "Session") -> int:
        knee = await session.find_knee(ramp)
        if not session.over:
            await session.check()
        status = session.finish()
        if knee is None:
            session.view.line("knee: none, not even the lowest load that was tried holds the service level")
            return status or 1
        more = "" if session.result["knee"]["bounded"] else " or more: no load was found that does not hold"
        session.view.line(f"knee: {knee.offered:.1f} requests/s{more}")
        _print_judgement(session)
        return status

    return asyncio.run(_in_session(_settings(options), options, work))


def _all(options: argparse.Namespace) -> int:
    from loadtest import whole
    from loadtest.subprocesses import Server

    if options.rounds < 1:
        raise LoadTestError(f"--rounds: found {options.rounds}; allowed: 1 or more")
    if not options.adapters.is_dir():
        raise LoadTestError(f"--adapters: found {options.adapters}, not a folder of adapters NAME/VERSION/")
    settings, plan = _settings(options), whole.Plan(options.backbone, options.adapters, _ramp(options), options.rounds)

    async def work(session: "Session") -> int:
        return await whole.run(session, plan)

    print(f"starting a server: backbone {options.backbone}, adapters {options.adapters}", flush=True)
    with Server(whole.server_settings(plan)) as server:
        results: list[Session] = []
        status = asyncio.run(_in_session(whole.settings_for(settings, server), options, work, results.append))
    # The last line is for programs, and comes only of a run that got that far.
    if results and results[0].result["in_process"]:
        print(whole.last_line(results[0].result))
    return status


async def _in_session(
    settings: "Settings",
    options: argparse.Namespace,
    work: "Callable[[Session], Any]",
    tell: "Callable[[Session], None]" = lambda _: None,
) -> int:
    """Run in a session; write result and report whatever became of it."""
    from loadtest import report, result
    from loadtest.live import View
    from loadtest.session import open_session

    async with open_session(settings, options.command_line, View(live=not options.no_live)) as session:
        tell(session)
        try:
            return int(await work(session))
        finally:
            paths = options.out / "result.json", options.out / "report.html"
            result.write(session.result, paths[0])
            report.write(session.result, paths[1])
            if not session.result["complete"]:
                session.view.line("the run did not complete; what it had is kept")
            session.view.line(f"written: {paths[0]}, {paths[1]}")


def _ramp(options: argparse.Namespace) -> Any:
    from loadtest.settings import RampSettings, make

    return make(
        RampSettings, start_rate=options.start_rate, growth=options.growth, max_rate=options.max_rate,
        resolution=options.resolution, step_s=options.step, warm_up_s=options.warm_up,
    )  # fmt: skip


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--html", type=Path, default=Path("report.html"), metavar="OUT", help="default: %(default)s")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from loadtest import report, result

    report.write(result.read(options.result), options.html)
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling; default: %(default)s")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from loadtest import compare, result

    rows = compare.compare(result.read(options.a), result.read(options.b), options.seed)
    if not rows:
        raise LoadTestError(f"{options.a} and {options.b} have no load in common, by name")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for phase, each in rows.items():
        table = Table("figure", "A", "B", "B/A", "95 %", "confidence", "B is", title=phase, title_justify="left")
        for row in each:
            table.add_row(
                row.name, f"{row.a:.4g}", f"{row.b:.4g}", f"{row.ratio:.3f}", f"{row.low:.3f} to {row.high:.3f}",
                f"{row.confidence:.3f}", row.verdict,
            )  # fmt: skip
        console.print(table)
    print(compare.summary(rows))
    return 0


def _print_phase(session: "Session", phase: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "latency, ms", "p50", "p95", "p99", title=f"{phase['total']['offered']} requests", title_justify="left"
    )
    for name, key in (("time to first token", "ttft"), ("between tokens", "itl"), ("end to end", "e2e")):
        if phase["total"][key]["count"]:
            table.add_row(name, *(f"{1000 * phase['total'][key][q]:.0f}" for q in ("p50", "p95", "p99")))
    Console().print(table)
    accuracy = "" if phase["accuracy"] is None else f"; exact answers {phase['accuracy']:.1%}"
    session.view.line(
        f"offered {phase['offered_per_second']:.2f} requests/s, answered "
        f"{phase['throughput_per_second']:.2f}, within the service level {phase['goodput_per_second']:.2f}; "
        f"{phase['completion_tokens_per_second']:.0f} tokens/s out{accuracy}; "
        f"generator {phase['generator']['cores']:.1%} of a core"
    )
    if (late := phase["generator"]["held_up"]["most"]) > _LATE_S:
        session.view.line(f"the generator was late itself, by up to {late:.2f} s: latencies hold that")
    delay = phase["server"] and phase["server"]["loop_delay"]
    if delay and delay["p99_from"] >= _LATE_S:
        session.view.line(
            f"the server's event loop was late, p99 above {delay['p99_from']:g} s: it measures less than clients wait"
        )
    _print_judgement(session)


def _print_judgement(session: "Session") -> None:
    statuses: dict[str, int] = {}
    for phase in session.result["phases"]:
        for status, count in phase["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    found = session.result["check"]
    checked = (
        f"; {found['exact']} exact, {found['same_alone']} as alone, {found['ties']} ties" if found else "; not checked"
    )
    session.view.line(
        f"statuses: {', '.join(f'{s} {n}' for s, n in sorted(statuses.items()))}; "
        f"failed {session.result['failed']}, wrong {session.result['wrong']}{checked}"
    )
