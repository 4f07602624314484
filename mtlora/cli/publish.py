"""`mtlora publish`: copy a checkpoint to where a server finds it."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Contribute `publish`."""
    parser = subparsers.add_parser("publish", help="copy a checkpoint to the next version of a served adapter")
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="such as out/mine/adapter")
    parser.add_argument("adapter", type=Path, metavar="ADAPTERS/NAME", help="such as adapters/mine")
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    from mtlora.checkpoint.publish import publish

    print(publish(args.checkpoint, args.adapter))
    return 0
