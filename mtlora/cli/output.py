"""Output of the commands: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def printable(value: object) -> str:
    """`value` as text without terminal control characters: texts in a checkpoint are untrusted."""
    text = value if isinstance(value, str) else str(value)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    json.dump(value, sys.stdout, indent=2)
    print()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table. Cells are plain text, not markup. Output to a file or pipe is not truncated."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold", show_lines=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Capture, then print: rich itself would exit the process when a pipe's reader is gone.
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


def print_fields(title: str, fields: Mapping[str, object]) -> None:
    """Print a table of names and values; nested mappings become dotted names."""
    print_table(title, ("field", "value"), list(_flat(fields)))


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
