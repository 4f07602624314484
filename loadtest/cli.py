"""`mtlora-loadtest`: load a running server, find its knee, write a report."""

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliPositionalArg, CliSubCommand, SettingsConfigDict, get_subcommand

from loadtest import LoadTestError, report, result
from loadtest.session import Session, open_session
from loadtest.settings import PhaseSettings, RampSettings, Settings
from mtlora.errors import describe

PROGRAM = "mtlora-loadtest"
# Warn above this delay of the generator, which then measures itself, or of the server's event loop, whose own times are
# then too short.
_LATE_S = 0.1


class _Measuring(Settings):
    async def measure(self, session: Session) -> int:
        """Load the server; returns the exit status."""
        raise NotImplementedError

    def work(self, command: list[str]) -> int:
        """Run the command; returns the exit status."""
        return asyncio.run(in_session(self, command, self.measure))


class Measurement(PhaseSettings, _Measuring):
    """One load, open or closed loop, against a running server. The load is one of --rate, --in-flight, --trace."""

    async def measure(self, session: Session) -> int:
        """Run one phase, check its answers, print what came of it."""
        phase = await session.run("run", self)
        if not session.over:
            await session.check()
        _print_phase(phase)
        _print_judgement(session.result)
        return session.finish()


class Knee(RampSettings, _Measuring):
    """Raise the load until the service level breaks."""

    async def measure(self, session: Session) -> int:
        """Find the knee, check the answers, print what came of it."""
        knee = await session.find_knee(self)
        if not session.over:
            await session.check()
        status = session.finish()
        if knee is None:
            print("knee: none; even the lowest load tried did not meet the service level")
            return status or 1
        more = "" if session.result["knee"]["bounded"] else " or more: every load tried met the service level"
        print(f"knee: {knee.offered:.1f} requests/s{more}")
        _print_judgement(session.result)
        return status


class Report(BaseModel):
    """Write a result's report again."""

    result: CliPositionalArg[Path] = Field(description="result.json of a run")
    html: Path = Field(Path("report.html"), description="file to write")

    def work(self, command: list[str]) -> int:
        """Write it; returns the exit status."""
        report.write(result.read(self.result), self.html)
        return 0


class FlagSettings(BaseSettings):
    """Settings that come only from flags."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_implicit_flags="toggle", cli_hide_none_type=True, cli_avoid_json=True,
        cli_enforce_required=True,
    )  # fmt: skip

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, **_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Use no environment and no file; pydantic-settings adds the flags by itself."""
        return (init_settings,)


class _Commands(FlagSettings, cli_prog_name=PROGRAM):
    """Load a server and report the results."""

    run: CliSubCommand[Measurement] = Field(description=Measurement.__doc__)
    knee: CliSubCommand[Knee] = Field(description=Knee.__doc__)
    report: CliSubCommand[Report] = Field(description=Report.__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 requests lost or answers wrong, 2 wrong use or no server, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        command: Any = get_subcommand(_Commands(_cli_parse_args=arguments or ["--help"]))
        return int(command.work([PROGRAM, *arguments]))

    return exit_status(PROGRAM, work)


def exit_status(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`. Errors that a user can put right are printed, not raised."""
    try:
        return work()
    except ValidationError as error:
        print(f"{program}: impossible settings: {describe(error)}", file=sys.stderr)
        return 2
    except LoadTestError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


async def in_session(settings: Settings, command: list[str], work: Callable[[Session], Awaitable[int]]) -> int:
    """Run `work` in a session; write result and report in any case."""
    async with open_session(settings, command) as session:
        try:
            return await work(session)
        finally:
            paths = settings.out / "result.json", settings.out / "report.html"
            result.write(session.result, paths[0])
            report.write(session.result, paths[1])
            if not session.result["complete"]:
                print("the run did not complete; its results so far are kept")
            print(f"written: {paths[0]}, {paths[1]}", flush=True)


def _print_phase(phase: dict[str, Any]) -> None:
    print(f"{phase['total']['offered']} requests; latency, ms{'p50':>11}{'p95':>9}{'p99':>9}")
    for name, key in (("time to first token", "ttft"), ("between tokens", "itl"), ("end to end", "e2e")):
        if phase["total"][key]["count"]:
            print(f"  {name:<24}" + "".join(f"{1000 * phase['total'][key][q]:9.0f}" for q in ("p50", "p95", "p99")))
    accuracy = "" if phase["accuracy"] is None else f"; exact answers {phase['accuracy']:.1%}"
    print(
        f"offered {phase['offered_per_second']:.2f} requests/s, answered "
        f"{phase['throughput_per_second']:.2f}, within the service level {phase['goodput_per_second']:.2f}; "
        f"{phase['completion_tokens_per_second']:.0f} tokens/s out{accuracy}; "
        f"generator {phase['generator']['cores']:.1%} of a core"
    )
    if (late := phase["generator"]["held_up"]["most"]) > _LATE_S:
        print(f"the generator itself was late by up to {late:.2f} s; the latencies include this")
    delay = phase["server"] and phase["server"]["loop_delay"]
    if delay and delay["p99_from"] >= _LATE_S:
        print(f"the server's event loop was late, p99 above {delay['p99_from']:g} s: its latencies leave this wait out")


def _print_judgement(made: dict[str, Any]) -> None:
    statuses: Counter[str] = Counter()
    first: dict[str, str] = {}
    for phase in made["phases"]:
        statuses.update(phase["statuses"])
        first = phase["errors"] | first
    found = made["check"]
    checked = (
        f"; {found['exact']} exact, {found['same_alone']} as alone, {found['ties']} ties" if found else "; not checked"
    )
    print(
        f"statuses: {', '.join(f'{s} {n}' for s, n in sorted(statuses.items()))}; "
        f"failed {made['failed']}, wrong {made['wrong']}{checked}"
    )
    for status, message in sorted(first.items()):
        print(f"  the first {status}: {message}")
