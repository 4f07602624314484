"""The base class of errors that a user can fix, and a one-line form of validation errors."""

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class MtLoRAError(ValueError):
    """An error that a user can fix. Its one line says what is wrong, where, and what is allowed; the CLI prints it."""


class BackboneError(MtLoRAError):
    """A backbone that cannot be used. Names the folder or file, what was found and what is needed."""


def differences(one: "BaseModel", other: "BaseModel") -> dict[str, tuple[object, object]]:
    """The fields of `one`'s class in which two models differ, with both values."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in type(one).model_fields}
    return {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if ours != theirs}


def describe(error: "ValidationError") -> str:
    """The first violations in one line: field, cause, value found."""
    parts = []
    for item in error.errors(include_url=False)[:3]:
        where = ".".join(str(part) for part in item["loc"])
        # Omit large values: pydantic gives the whole object (of a dataclass, its arguments) for a missing field or a
        # rule about several fields, and the whole text for invalid JSON.
        omitted = isinstance(item["input"], dict | bytes) or type(item["input"]).__name__ == "ArgsKwargs"
        found = "" if omitted else f" (found {reprlib.repr(item['input'])})"
        parts.append((f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ") + found)
    more = error.error_count() - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")
