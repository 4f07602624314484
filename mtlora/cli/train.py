"""`mtlora train`: train an adapter for a suite of tasks."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mtlora.cli.backbone import add_backbone_argument

# Flags of their own for what is changed most; everything else goes by --set.
_SHORTCUTS = ("suite", "examples_per_task", "epochs", "batch_size", "learning_rate", "seed", "threads", "max_steps")


def add_parser(subparsers: Any) -> None:
    """Contribute `train`."""
    parser = subparsers.add_parser(
        "train",
        help="train an adapter for a suite of tasks",
        description="Trains an adapter beside the frozen backbone. DIR gets training.json (the configuration), "
        "log.jsonl (a line a step), state.pt (to go on from) and, at the end, adapter/ (the checkpoint).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON of a training configuration; flags win over it"
    )
    add_backbone_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR, or begin where there is none")
    for name in _SHORTCUTS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="X", help=argparse.SUPPRESS if name == "max_steps" else name
        )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="any other setting, such as adapter.r=32"
    )
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    # Threads that wait without spinning lose little alone and little beside other work; spinning loses tenfold there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mtlora.backbone import resolve
    from mtlora.cli.evaluate import print_scores
    from mtlora.errors import MtLoRAError
    from mtlora.train.config import TrainingConfig
    from mtlora.train.trainer import Trainer

    try:
        settings = json.loads(args.config.read_text()) if args.config else {}
    except (OSError, json.JSONDecodeError) as error:
        raise MtLoRAError(f"--config {args.config}: {error}") from None
    flags = [f"{name}={getattr(args, name)}" for name in _SHORTCUTS if getattr(args, name) is not None]
    for flag in flags + args.set:
        assign(settings, flag)
    trainer = Trainer(TrainingConfig.model_validate(settings), resolve(args.backbone), args.out, resume=args.resume)
    manifest = trainer.fit()
    print_scores(manifest.evaluation)
    print(trainer.folder.checkpoint)
    return 0


def assign(settings: dict[str, Any], flag: str) -> None:
    """Set `a.b=JSON` in nested settings; what is no JSON is a string."""
    from mtlora.errors import MtLoRAError

    key, separator, raw = flag.partition("=")
    if not separator:
        raise MtLoRAError(f"--set {flag!r}: expected KEY=VALUE")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    *parents, last = key.strip().split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value
