"""Reads load-test results: the few fields that a service model is fitted to, and nothing else of the format.

Taken are the phases that are closed loops and keep every request (`mtlora-loadtest --outcomes`): `load.in_flight`,
`throughput_per_second`, and of each of `outcomes` its status, times and tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.capacity.errors import CapacityError

_FORMAT = 1
_FIELDS = ("time_to_first_token_s", "seconds", "prompt_tokens", "completion_tokens")
_LEAST = 10


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request. Times in seconds."""

    ttft: float
    seconds: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Level:
    """A closed loop at one concurrency: what was answered, and how many a second."""

    in_flight: int
    throughput: float
    answered: tuple[Answered, ...]


def read_levels(paths: Sequence[Path]) -> list[Level]:
    """The closed loops of all results. Raises CapacityError for a file that is no result, or where there is no loop."""
    return [level for path in paths for level in _read(path)]


def _read(path: Path) -> list[Level]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != _FORMAT:
            raise CapacityError(f"{path}: format: found {document['format']!r}, expected {_FORMAT}")
        phases = [phase for phase in document["phases"] if phase["kind"] == "closed" and "outcomes" in phase]
        levels = [_level(path, phase) for phase in phases]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CapacityError(f"{path}: not a readable load-test result: {error}") from None
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, CapacityError):
            raise
        raise CapacityError(f"{path}: not a load-test result: {type(error).__name__}: {error}") from None
    if not levels:
        raise CapacityError(
            f"{path}: no closed loop that keeps every request (mtlora-loadtest --in-flight N --outcomes)"
        )
    return levels


def _level(path: Path, phase: Mapping[str, Any]) -> Level:
    where = f"{path}: phase {phase['name']}"
    good = [each for each in phase["outcomes"] if each["status"] == "OK" and each["completion_tokens"]]
    if len(good) < _LEAST:
        raise CapacityError(f"{where}: found {len(good)} answered requests; a service model needs at least {_LEAST}")
    if any(each["time_to_first_token_s"] is None for each in good):
        raise CapacityError(f"{where}: time_to_first_token_s: found null; expected times, as streams have them")
    throughput = float(phase["throughput_per_second"])
    if not throughput > 0:
        raise CapacityError(f"{where}: throughput_per_second: found {throughput}; expected a number above 0")
    answered = tuple(Answered(*(each[name] for name in _FIELDS)) for each in good)
    return Level(int(phase["load"]["in_flight"]), throughput, answered)


def document(levels: Sequence[Level]) -> dict[str, Any]:
    """Levels in the form of a load-test result, as far as this package reads it."""
    return {"format": _FORMAT, "phases": [_phase(level) for level in levels]}


def _phase(level: Level) -> dict[str, Any]:
    rows = [(each.ttft, each.seconds, each.prompt_tokens, each.completion_tokens) for each in level.answered]
    return {
        "name": f"{level.in_flight} in flight",
        "kind": "closed",
        "load": {"in_flight": level.in_flight},
        "throughput_per_second": level.throughput,
        "outcomes": [{"status": "OK", **dict(zip(_FIELDS, row, strict=True))} for row in rows],
    }
