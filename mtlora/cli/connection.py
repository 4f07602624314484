"""Credential flags of all commands that call a running server, here and in `mtlora-server`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtlora.client import Access

_KEY_VARIABLE = "MTLORA_API_KEY"


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for an API key or token, and for TLS."""
    # Take a file, not the key itself: other users of the machine can read a process's arguments.
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the API key or token; default: {_KEY_VARIABLE}'s value",
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM authorities of the server; without: no TLS")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM certificate to show the server")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its PEM key")
    parser.add_argument("--tls-server-name", metavar="NAME", help="name in the server's certificate, if another")


def access_from(options: argparse.Namespace) -> "Access":
    """The credentials in the flags and the environment. Raises OSError; ValueError for contradictory flags."""
    from mtlora.client import Access

    for flag in ("tls_certificate", "tls_key", "tls_server_name"):
        if getattr(options, flag) and not options.tls_ca:
            raise ValueError(f"--{flag.replace('_', '-')}: found without --tls-ca; allowed: with it")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise ValueError("--tls-certificate, --tls-key: found one alone; allowed: both or neither")
    key = options.api_key_file.read_text().strip() if options.api_key_file else os.environ.get(_KEY_VARIABLE)
    return Access(key, options.tls_ca, options.tls_certificate, options.tls_key, options.tls_server_name)
