"""Reads load-test results: the few fields that a service model is fitted to, and nothing else of the format.

A result is JSON with `outcomes`, a list of requests, and `settings.in_flight`, how many were in flight at a time; every
request has `status`, `time_to_first_token_s`, `seconds` (end to end), `prompt_tokens` and `completion_tokens`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.capacity.errors import CapacityError

_FIELDS = ("time_to_first_token_s", "seconds", "prompt_tokens", "completion_tokens")


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


def document(level: Level) -> dict[str, Any]:
    """A level in the form of a load-test result, as far as this package reads it."""
    outcomes = [
        {
            "status": "OK",
            "time_to_first_token_s": each.ttft,
            "seconds": each.seconds,
            "prompt_tokens": each.prompt_tokens,
            "completion_tokens": each.completion_tokens,
        }
        for each in level.answered
    ]
    return {
        "settings": {"in_flight": level.in_flight},
        "seconds": len(level.answered) / level.throughput,
        "outcomes": outcomes,
    }


def read_level(path: Path) -> Level:
    """Raises CapacityError for a file that is no load-test result, or has too little in it."""
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CapacityError(f"{path}: not a readable load-test result: {error}") from None
    try:
        return level(document)
    except CapacityError as error:
        raise CapacityError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError) as error:
        raise CapacityError(f"{path}: not a load-test result: {type(error).__name__}: {error}") from None


def level(document: Mapping[str, Any]) -> Level:
    """A level from a result's JSON. Raises CapacityError for too few answers; LookupError, TypeError for no result."""
    good = [outcome for outcome in document["outcomes"] if outcome["status"] == "OK" and outcome["completion_tokens"]]
    if len(good) < 10:
        raise CapacityError(f"found {len(good)} answered requests; a service model needs at least 10")
    answered = tuple(Answered(*(outcome[name] for name in _FIELDS)) for outcome in good)
    seconds = float(document["seconds"])
    if seconds <= 0:
        raise CapacityError(f"seconds: found {seconds}; expected the time that the load took")
    return Level(int(document["settings"]["in_flight"]), len(good) / seconds, answered)
