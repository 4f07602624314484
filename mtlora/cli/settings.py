"""Reads a training configuration from a file and flags."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtlora.errors import MtLoRAError


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--set KEY=JSON`, the same in every command."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON",
        help="any other setting, such as adapter.r=32; @FILE: all settings of a JSON file",
    )  # fmt: skip


def read_settings(file: Path | None, flags: Sequence[str]) -> dict[str, Any]:
    """Settings of the file, then of flags `a.b=JSON` or `@FILE`; later ones override earlier ones.

    Raises MtLoRAError naming file or flag.
    """
    settings: dict[str, Any] = {}
    for flag in (*([f"@{file}"] if file else ()), *flags):
        if flag.startswith("@"):
            settings |= read_json(Path(flag[1:]))
        else:
            _assign(settings, flag)
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises MtLoRAError naming the file."""
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise MtLoRAError(f"{file}: {error}") from None
    if not isinstance(settings, dict):
        raise MtLoRAError(f"{file}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _assign(settings: dict[str, Any], flag: str) -> None:
    """Set `a.b=JSON` in nested settings; a value that is not JSON is a string."""
    key, separator, raw = flag.partition("=")
    if not separator:
        raise MtLoRAError(f"--set {flag!r}: expected KEY=VALUE")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = settings.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise MtLoRAError(f"--set {flag!r}: {parent} is {inner!r}, which has no {last}")
        settings = inner
    settings[last] = value
