"""The result of a run: one JSON document with every setting, what was measured, and how it was judged."""

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest import LoadTestError
from loadtest.phase import Ran
from loadtest.recorder import CUT_OFF, Group
from loadtest.settings import PhaseSettings

FORMAT = 1
# Statuses of an overloaded server; they are expected when the load is deliberately too high.
OVERLOAD = frozenset({"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
_PACKAGES = ("grpcio", "protobuf", "hdrhistogram", "mtlora")


def phase_json(name: str, load: PhaseSettings, ran: Ran, server: Mapping[str, Any] | None) -> dict[str, Any]:
    """The measurements of one phase. Rates are per second of the window, latencies in seconds."""
    recorder = ran.recorder
    total, seconds = recorder.total, recorder.seconds
    return {
        "name": name,
        "kind": load.kind,
        "load": load.model_dump(mode="json", include=set(PhaseSettings.model_fields), exclude_none=True),
        "window_s": round(seconds, 3),
        "offered_per_second": _rate(total.offered, seconds),
        "throughput_per_second": _rate(recorder.ended, seconds),
        "goodput_per_second": _rate(total.good, seconds),
        "completion_tokens_per_second": _rate(recorder.ended_tokens, seconds),
        "prompt_tokens_per_second": _rate(total.prompt_tokens, seconds),
        "accuracy": total.exact / total.scored if total.scored else None,
        "flawed": flawed(recorder.everything),
        "statuses": dict(recorder.everything.statuses),
        "errors": recorder.errors,
        "flaws": recorder.flaws,
        "total": total.to_json(),
        "tasks": {name: group.to_json() for name, group in recorder.tasks.items() if group.offered},
        "tenants": {name: group.to_json() for name, group in recorder.tenants.items() if group.offered},
        "fairness": {"tasks": _fairness(recorder.tasks), "tenants": _fairness(recorder.tenants)},
        "generator": {
            "cpu_s": round(ran.cpu_s, 3),
            "wall_s": round(ran.wall_s, 3),
            "cores": round(ran.cpu_s / ran.wall_s, 4) if ran.wall_s else 0.0,
            "send_lag": recorder.lag.to_json(),
            "held_up": {**recorder.held_up.to_json(), "most": recorder.held_up.quantile(1.0)},
        },
        "server": server,
        "complete": not ran.stopped,
        **({} if recorder.outcomes is None else {"outcomes": recorder.outcomes}),
    }


def failed(group: Group, *, tolerated: bool) -> int:
    """The number of lost requests: errors, and replies that cannot be right. Requests cut off here are not lost.

    tolerated: the load is beyond the service level, so refusals do not count.
    """
    errors = sum(
        count
        for status, count in group.statuses.items()
        if status not in ("OK", CUT_OFF) and not (tolerated and status in OVERLOAD)
    )
    return errors + flawed(group)


def flawed(group: Group) -> int:
    """The number of replies with status OK that are incomplete or belong to another request."""
    return group.statuses["OK"] - group.ok


def document(command: list[str], settings: Mapping[str, Any], server: Mapping[str, Any]) -> dict[str, Any]:
    """A result without phases yet."""
    return {
        "format": FORMAT,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": _processor(), "system": platform.platform()},
        "server": dict(server),
        "phases": [],
        "knee": None,
        "check": None,
        "in_process": None,
        "complete": False,
        "failed": 0,
        "wrong": 0,
    }


def write(result: Mapping[str, Any], path: Path) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read a result. Raises LoadTestError if the file holds none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{path}: cannot be read as a result: {error}") from None
    if not isinstance(result, dict) or "phases" not in result or result.get("format") != FORMAT:
        raise LoadTestError(f"{path}: not a result of this program (format {FORMAT})")
    return result


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 4) if seconds else 0.0


def jain(shares: Iterable[float]) -> float:
    """Jain's index of fairness, (Σx)² / (n·Σx²).

    1 if all shares are equal, 1/n if one has everything; 1 for no shares and for shares of zero.
    """
    xs = list(shares)
    squares = sum(x * x for x in xs)
    return sum(xs) ** 2 / (len(xs) * squares) if squares else 1.0


def _fairness(groups: Mapping[str, Group]) -> float:
    """Jain's index over the groups' shares of requests answered within the service level."""
    return round(jain(group.good / group.offered for group in groups.values() if group.offered), 4)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
