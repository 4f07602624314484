"""`mtlora-server`: each command is a module, imported only when it runs."""

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib import import_module

# Each command is a module here with `add_arguments` and `run`.
_COMMANDS = {
    "serve": "run the server",
    "ask": "ask a running server",
    "analyze": "ask a running server many tasks about one file",
    "tasks": "list a running server's tasks",
    "adapters": "of a running server",
    "usage": "what the tenants of a running server used, as JSON lines",
    "demo": "start a server and ask it every built-in task at once",
    "demo-vision": "start a server of images and ask it every built-in task of images at once",
    "new-key": "make an API key, and its entry for the tenants file",
}

# Raise the threshold of garbage collections: importing vLLM makes millions of lasting objects, and with Python's own
# threshold collections take a tenth of the import time. The engine's processes import this module first, so it applies
# to them too.
gc.set_threshold(50_000, 20, 20)


class CommandError(Exception):
    """Ends a command with a message on stderr. Exit status: 1 failed, 2 wrong use."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, `serve` if none is named; returns the exit status: 0 done, 1 failed, 2 wrong use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*_COMMANDS, "-h", "--help", "--version"):
        arguments.insert(0, "serve")
    options = _parser(arguments[0]).parse_args(arguments)
    try:
        return int(options.run(options))
    except CommandError as error:
        print(f"mtlora-server: {error}", file=sys.stderr)
        return error.status


def _parser(named: str) -> argparse.ArgumentParser:
    """The parser of all commands; adds arguments only for the command that is called."""
    from mtlora import __version__

    parser = argparse.ArgumentParser(
        "mtlora-server", description="Many tasks from one frozen backbone, over gRPC. Without a command: serve."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == named:
            module = import_module(f"server.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
