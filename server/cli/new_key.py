"""`mtlora-server new-key`: make an API key."""

import argparse
import sys

from server.tenants.keys import new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print the key on stderr and its entry for the tenants file on stdout; returns 0."""
    key, key_id, hashed = new_key()
    print(f"the key, shown this once: {key}", file=sys.stderr)
    print(f"- id: {key_id}\n  hash: {hashed}")
    return 0
