"""The base of every error that a user can fix, and one line for a failed validation."""

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class MtLoRAError(ValueError):
    """Says in one line what is wrong and where, what was expected and what was found; the CLI prints that line."""


class BackboneError(MtLoRAError):
    """A backbone that cannot be used. Names the folder or file, what was found and what is needed."""


def differences(one: "BaseModel", other: "BaseModel") -> dict[str, tuple[object, object]]:
    """The fields of `one`'s model in which two models differ, with the values of both."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in type(one).model_fields}
    return {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if ours != theirs}


def describe(error: "ValidationError") -> str:
    """The first few violations in one line: field, cause, what was found."""
    parts = []
    for item in error.errors(include_url=False)[:3]:
        where = ".".join(str(part) for part in item["loc"])
        # For a missing field or a rule about several, pydantic gives the whole object; for bad JSON, the whole text.
        found = "" if isinstance(item["input"], dict | bytes) else f" (found {reprlib.repr(item['input'])})"
        parts.append((f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ") + found)
    more = error.error_count() - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")
