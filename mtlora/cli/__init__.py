"""The `mtlora` command. Each command group is a module with `add_parser(subparsers)`, which sets `run(args) -> int`.

Command modules import torch, transformers and the like inside `run`, so `mtlora --help` is fast.
"""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mtlora import __version__

# Commands in the order in which `--help` lists them.
_COMMANDS = (
    "backbone",
    "tasks",
    "train",
    "sweep",
    "evaluate",
    "plot",
    "checkpoint",
    "merge",
    "seams",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for a failed check, 2 for a user's error, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    warnings.formatwarning = _format_warning
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`| head`) is gone: prevent a second error when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A file or folder that cannot be read or written, a full disk.
        print(
            f"mtlora: error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        if (message := _message(error)) is None:
            raise
        print(f"mtlora: error: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mtlora", description="Many tasks from one frozen backbone.")
    parser.add_argument("--version", action="version", version=f"mtlora {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"mtlora.cli.{name}").add_parser(subparsers)
    return parser


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A line in a user's words for this package's warnings."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"mtlora: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _message(error: ValueError) -> str | None:
    """The line to print for a user's error; None for a bug, whose traceback is shown."""
    from pydantic import ValidationError

    from mtlora.errors import MtLoRAError, describe

    if isinstance(error, ValidationError):
        return f"{error.title}: {describe(error)}"
    return " ".join(str(error).split()) if isinstance(error, MtLoRAError) else None
