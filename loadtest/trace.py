"""A trace: a JSONL file of when what was asked, so that it can be asked again.

    {"at": 0.25, "task": "navigate", "input": "Take 2 steps.", "tenant": "acme", "max_new_tokens": 8, "target": "No"}

`at` is in seconds, from any origin, never falling. All else may be left out: what is missing is drawn as the workload's
settings say. `input` may be a text, an object of named fields, or a list of chat messages.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError

_ENTRY_KEYS = ("task", "input", "target", "max_new_tokens")
_TRACE_KEYS = ("at", "tenant", *_ENTRY_KEYS)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line; None where it leaves something to be drawn."""

    task: str | None = None
    input: Any = None
    target: str | None = None
    max_new_tokens: int | None = None
    tenant: str | None = None
    at: float = 0.0


def read_trace(path: Path) -> list[Entry]:
    """The trace, its first time moved to 0. Raises LoadTestError naming the line."""
    entries = parse_trace(_read(path), str(path))
    first = entries[0].at
    return [Entry(e.task, e.input, e.target, e.max_new_tokens, e.tenant, e.at - first) for e in entries]


def parse_trace(lines: Iterable[str], where: str) -> list[Entry]:
    """As `read_trace`, with the times as they stand."""
    entries: list[Entry] = []
    for place, line in _documents(lines, where):
        at = line.get("at")
        if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
            raise LoadTestError(f'{place}: "at" must be a number of seconds, found {_shown(at)}')
        if entries and at < entries[-1].at:
            raise LoadTestError(f'{place}: "at" is {at:g}, before the {entries[-1].at:g} of the line above')
        entries.append(_entry(line, place, _TRACE_KEYS))
    if not entries:
        raise LoadTestError(f"{where}: no line in it; a trace needs at least one")
    return entries


def read_prompts(path: Path) -> list[Entry]:
    """A file of inputs: as a trace, without `at` and `tenant`, and with `input` in every line."""
    entries = []
    for place, line in _documents(_read(path), str(path)):
        if "input" not in line:
            raise LoadTestError(f'{place}: no "input"')
        entries.append(_entry(line, place, _ENTRY_KEYS))
    if not entries:
        raise LoadTestError(f"{path}: no line in it; a file of prompts needs at least one")
    return entries


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path}: cannot be read: {error}") from None


def _documents(lines: Iterable[str], where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        place = f"{where}: line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadTestError(f"{place}: not JSON: {error}") from None
        if not isinstance(line, dict):
            raise LoadTestError(f"{place}: expected an object, found {_shown(line)}")
        yield place, line


def _entry(line: dict[str, Any], place: str, keys: tuple[str, ...]) -> Entry:
    if unknown := sorted(set(line) - set(keys)):
        raise LoadTestError(f"{place}: no such key {unknown[0]!r}; allowed: {', '.join(keys)}")
    for key in ("task", "target", "tenant"):
        if key in line and not isinstance(line[key], str):
            raise LoadTestError(f'{place}: "{key}" must be a text, found {_shown(line[key])}')
    tokens = line.get("max_new_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens < 2**32):
        raise LoadTestError(f'{place}: "max_new_tokens" must be a whole number from 1, found {_shown(tokens)}')
    if "input" in line and not _is_input(line["input"]):
        raise LoadTestError(
            f'{place}: "input" must be a text, an object of texts, or a list of {{"role", "content"}} objects'
        )
    if "input" in line and "task" not in line and not isinstance(line["input"], str):
        raise LoadTestError(f'{place}: an "input" of named fields or messages needs a "task"')
    return Entry(
        line.get("task"), line.get("input"), line.get("target"), tokens, line.get("tenant"), float(line.get("at", 0))
    )


def _is_input(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return bool(value) and all(isinstance(each, str) for each in value.values())
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, dict) and set(each) == {"role", "content"} and all(map(_is_text, each.values()))
            for each in value
        )
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
