"""How commands reach a running server."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtlora.client import Access, Client, ServerError
from server.cli import CommandError

_KEY_VARIABLE = "MTLORA_API_KEY"
_ADDRESS_VARIABLE = "MTLORA_ADDRESS"


def add_address(parser: argparse.ArgumentParser) -> None:
    """Arguments for where the server is and how it lets the caller in."""
    parser.add_argument(
        "--address",
        default=os.environ.get(_ADDRESS_VARIABLE, "127.0.0.1:50051"),
        metavar="HOST:PORT",
        help=f"default: {_ADDRESS_VARIABLE}'s value, or 127.0.0.1:50051",
    )
    # Not the key itself: other users of the machine can read a process's arguments.
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the API key; default: {_KEY_VARIABLE}'s value",
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM authorities of the server; without: no TLS")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM certificate to show the server")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its PEM key")


@contextmanager
def connect(options: argparse.Namespace) -> Iterator[Client]:
    """A client of the server that `add_address` names. Raises CommandError for every failure of a request."""
    try:
        key = options.api_key_file.read_text().strip() if options.api_key_file else os.environ.get(_KEY_VARIABLE)
        access = Access(key, options.tls_ca, options.tls_certificate, options.tls_key)
        with Client(options.address, access) as client:
            yield client
    except OSError as error:
        raise CommandError(str(error), 2) from None
    except ServerError as error:
        lines = [f"{error.code.name}: {error.message}"]
        if len(error.violations) > 1:
            lines = [f"{error.code.name}:", *(f"  {field}: {description}" for field, description in error.violations)]
        raise CommandError("\n".join(lines), 1) from None
