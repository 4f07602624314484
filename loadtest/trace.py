"""Traces: JSONL files of requests and their times, which can be replayed.

    {"at": 0.25, "task": "navigate", "input": "Take 2 steps.", "tenant": "acme", "max_new_tokens": 8, "target": "No"}

`at` is in seconds, from any origin, and never falls. All other keys are optional: missing values are drawn by the
workload's settings. `input` may be a text, an object of named fields, or a list of chat messages.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest import LoadTestError
from mtlora.errors import describe

Text = Annotated[str, Field(pattern=r"\S")]
Fields = Annotated[dict[str, str], Field(min_length=1)]
Message = Annotated[dict[Literal["role", "content"], str], Field(min_length=2)]
Input = Text | Fields | Annotated[list[Message], Field(min_length=1)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task: str | None = None
    input: Input | None = None
    target: str | None = None
    max_new_tokens: int | None = Field(None, ge=1, lt=2**32)

    @model_validator(mode="after")
    def _other_inputs_than_texts_have_a_task(self) -> Self:
        if self.task is None and isinstance(self.input, dict | list):
            raise ValueError("an input of named fields or messages needs a task")
        return self


class Entry(_Line):
    """One line of a trace. Fields at None are drawn."""

    at: float = Field(allow_inf_nan=False)
    tenant: str | None = None


class Prompt(_Line):
    """One line of a file of prompts."""

    input: Input


Line = TypeVar("Line", bound=_Line)


def read_trace(path: Path) -> list[Entry]:
    """Read a trace and move its first time to 0. Raises LoadTestError naming the line."""
    entries = parse_trace(read_lines(path), str(path))
    return [entry.model_copy(update={"at": entry.at - entries[0].at}) for entry in entries]


def parse_trace(lines: Iterable[str], where: str) -> list[Entry]:
    """Like `read_trace`, with the times unchanged."""
    entries: list[Entry] = []
    for place, entry in _parse(Entry, lines, where):
        if entries and entry.at < entries[-1].at:
            raise LoadTestError(f'{place}: "at" is {entry.at:g}, before the {entries[-1].at:g} of the line above')
        entries.append(entry)
    if not entries:
        raise LoadTestError(f"{where}: no line in it; a trace needs at least one")
    return entries


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of inputs: like a trace without `at` and `tenant`, and with `input` in every line."""
    prompts = [prompt for _, prompt in _parse(Prompt, read_lines(path), str(path))]
    if not prompts:
        raise LoadTestError(f"{path}: no line in it; a file of prompts needs at least one")
    return prompts


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises LoadTestError."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path}: cannot be read: {error}") from None


def _parse(kind: type[Line], lines: Iterable[str], where: str) -> Iterator[tuple[str, Line]]:
    """(place, line) of every line that is not blank."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        place = f"{where}: line {number}"
        try:
            yield place, kind.model_validate_json(text)
        except ValidationError as error:
            raise LoadTestError(f"{place}: {describe(error)}") from None
