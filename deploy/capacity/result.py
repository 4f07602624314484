"""Reads from load-test results the few fields that a service model is fitted to.

Only closed loops that keep every request (`mtlora-loadtest --outcomes`) are used.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from deploy.capacity import CapacityError
from mtlora.errors import describe

_FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)


class Answered(_Part):
    """One answered request. Times in seconds; whole answers (`--unary`) may lack the time of the first token."""

    ttft: float = Field(alias="time_to_first_token_s")
    seconds: float
    prompt_tokens: int
    completion_tokens: int


def _answered(outcomes: Any) -> Any:
    """The answered ones among a result's outcomes."""
    if all(isinstance(each, Answered) for each in outcomes):
        return outcomes
    return tuple(each for each in outcomes if each["status"] == "OK" and each["completion_tokens"])


class Level(_Part):
    """A closed loop at one concurrency. throughput: requests a second."""

    in_flight: int = Field(validation_alias=AliasPath("load", "in_flight"))
    throughput: float = Field(gt=0, validation_alias="throughput_per_second")
    answered: Annotated[tuple[Answered, ...], BeforeValidator(_answered)] = Field(
        min_length=10, validation_alias="outcomes"
    )


def read_levels(paths: Sequence[Path]) -> list[Level]:
    """The closed loops of all results. Raises CapacityError for a file that is no result or has no closed loop."""
    return [level for path in paths for level in _read(path)]


def _read(path: Path) -> list[Level]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != _FORMAT:
            raise CapacityError(f"{path}: format: found {document['format']!r}, expected {_FORMAT}")
        phases = [phase for phase in document["phases"] if phase["kind"] == "closed" and "outcomes" in phase]
        levels = TypeAdapter(list[Level]).validate_python(phases)
    except ValidationError as error:
        raise CapacityError(f"{path}: no closed loops to fit a model to: {describe(error)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise CapacityError(f"{path}: not a load-test result: {type(error).__name__}: {error}") from None
    if not levels:
        raise CapacityError(
            f"{path}: no closed loop that keeps every request (mtlora-loadtest --in-flight N --outcomes)"
        )
    return levels


def document(levels: Sequence[Level]) -> dict[str, Any]:
    """Levels as a load-test result, with the fields that this package reads."""
    return {
        "format": _FORMAT,
        "phases": [
            {
                "name": f"{level.in_flight} in flight",
                "kind": "closed",
                "load": {"in_flight": level.in_flight},
                "throughput_per_second": level.throughput,
                "outcomes": [{"status": "OK", **each.model_dump(by_alias=True)} for each in level.answered],
            }
            for level in levels
        ],
    }
