"""`mtlora plot`: pictures of a checkpoint."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Contribute `plot`."""
    parser = subparsers.add_parser("plot", help="draw a checkpoint's accuracy, a bar a task")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint, or a file that eval --json wrote")
    parser.add_argument("--out", type=Path, default=Path("accuracy.png"), metavar="FILE", help="PNG, SVG or PDF")
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> int:
    from mtlora.checkpoint import read_manifest
    from mtlora.errors import MtLoRAError
    from mtlora.plot import plot_accuracy

    if args.source.is_dir():
        evaluation = read_manifest(args.source).evaluation
    else:
        try:
            evaluation = json.loads(args.source.read_text())
        except (OSError, ValueError) as error:
            raise MtLoRAError(f"{args.source}: {error}") from None
    if "adapter" not in evaluation:
        raise MtLoRAError(f"{args.source}: no evaluation in it; mtlora eval --json makes one")
    plot_accuracy(evaluation, args.out)
    print(args.out)
    return 0
