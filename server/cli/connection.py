"""Connects commands to a running server."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mtlora.cli.connection import access_from, add_access_arguments
from mtlora.client import Client, ServerError
from server.cli import CommandError

_ADDRESS_VARIABLE = "MTLORA_ADDRESS"


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the server's address and the caller's credentials."""
    parser.add_argument(
        "--address",
        default=os.environ.get(_ADDRESS_VARIABLE, "127.0.0.1:50051"),
        metavar="HOST:PORT",
        help=f"default: {_ADDRESS_VARIABLE}'s value, or 127.0.0.1:50051",
    )
    add_access_arguments(parser)


@contextmanager
def connect(options: argparse.Namespace) -> Iterator[Client]:
    """A client of the server that `add_address` names. Raises CommandError for every failure of a request."""
    try:
        access = access_from(options)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), 2) from None
    try:
        with Client(options.address, access, retry=None) as client:
            yield client
    except OSError as error:
        raise CommandError(str(error), 2) from None
    except ServerError as error:
        lines = [f"{error.code.name}: {error.message}"]
        if len(error.violations) > 1:
            lines = [f"{error.code.name}:", *(f"  {field}: {description}" for field, description in error.violations)]
        raise CommandError("\n".join(lines), 1) from None
