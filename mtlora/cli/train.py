"""`mtlora train`: train an adapter for a suite of tasks."""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mtlora.cli.backbone import add_backbone_argument, add_vision_argument, backbone_for, vision_for
from mtlora.cli.output import print_table
from mtlora.cli.settings import add_set_argument, read_settings

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest
    from mtlora.model.baseline import BaselineManifest
    from mtlora.train.config import TrainingConfig
    from mtlora.train.trainer import Trainer

# Settings that users change most have own flags; --set changes any other.
_SHORTCUTS = ("suite", "examples_per_task", "epochs", "batch_size", "learning_rate", "seed", "threads", "max_steps")


def add_parser(subparsers: Any) -> None:
    """Add the command `train`."""
    parser = subparsers.add_parser(
        "train",
        help="train an adapter for a suite of tasks",
        description="Trains an adapter beside the frozen backbone. DIR gets training.json (the configuration), "
        "log.jsonl (a line per step), state.pt (to resume from) and, at the end, adapter/ (the checkpoint). Under "
        "torchrun every process takes its share of each batch.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON of a training configuration; flags win over it"
    )
    add_backbone_argument(parser, None)
    add_vision_argument(parser)
    parser.add_argument("--resume", action="store_true", help="resume the run in DIR, or start one")
    parser.add_argument(
        "--profile", type=int, metavar="STEPS", help="train this many steps, print where the time goes, keep nothing"
    )
    for name in _SHORTCUTS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="X", help=argparse.SUPPRESS if name == "max_steps" else name
        )
    add_set_argument(parser)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    # Let waiting threads sleep. Threads that spin beside other work make training ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mtlora.backbone import resolve
    from mtlora.cli.scores import print_scores
    from mtlora.errors import MtLoRAError
    from mtlora.suite import load_suite
    from mtlora.train.config import TrainingConfig
    from mtlora.train.defaults import training_config
    from mtlora.train.examples import chosen_tasks
    from mtlora.train.trainer import Trainer

    if (args.out is None) == (args.profile is None):
        raise MtLoRAError("one of --out DIR and --profile STEPS is needed")
    if args.profile is not None and args.profile < 1:
        raise MtLoRAError(f"--profile: found {args.profile}; allowed: 1 or more")
    flags = [f"{name}={getattr(args, name)}" for name in _SHORTCUTS if getattr(args, name) is not None]
    settings = read_settings(args.config, flags + args.set)
    suite = load_suite(TrainingConfig.model_validate(settings).suite)
    folder = resolve(backbone_for(args.backbone, suite))
    config = training_config(settings, suite)
    vision = vision_for(args.vision_backbone, chosen_tasks(suite, config.tasks))
    if args.profile is not None:
        return _profile(config, folder, vision, args.profile)
    trainer = Trainer(config, folder, args.out, vision=vision, resume=args.resume, announce=_print_plan)
    manifest = trainer.fit(lines=True)
    if trainer.ranks.first:
        print_scores(manifest.evaluation)
        _compare_with_heads(manifest)
        print(trainer.folder.checkpoint)
    return 0


def _print_plan(trainer: "Trainer") -> None:
    """Print what the run is about to do; of images, how many there are of each task."""
    config, images = trainer.config, trainer.work.images()
    rates = f"learning rate {config.learning_rate:g}"
    if config.relative_expert_rate is not None:
        rates += f" (experts: times {config.relative_expert_rate:g} times their block's output)"
    if images:
        rows = [
            (task.id, len(task.labels or ()), *("any" if count is None else count for count in images[task.id]))
            for task in trainer.tasks
        ]
        print_table("images", ("task", "classes", "train", "validation", "test"), rows)
        rates += f", of heads {config.learning_rate * config.head_learning_rate_scale:g}; "
        rates += f"paths from layer {config.frozen_layers} on"
        print(f"a new run first fits linear heads to {sum(train for train, _, _ in images.values())} images' features")
    print(
        f"{len(trainer.tasks)} tasks, {len(trainer.batches)} steps of up to {config.batch_size} examples, "
        f"epochs {config.epochs}, {rates}",
        flush=True,
    )


def _compare_with_heads(manifest: "AdapterManifest | BaselineManifest") -> None:
    """Print how an adapter for images compares with linear heads; warn where it is not above them."""
    found, best = manifest.evaluation, manifest.training.get("best_step")
    # Runs on texts, and of linear heads alone, have no best step.
    if not found or best is None:
        return
    with_adapter, alone = (found[name]["mean_accuracy"] for name in ("adapter", "backbone_alone"))
    print(f"validation: adapter {with_adapter:.3f} (step {best}), linear heads alone {alone:.3f}")
    if with_adapter <= alone:
        print(
            "mtlora: the adapter is not above linear heads: try more steps (--epochs), another --learning-rate, or "
            "--set validation_per_task=100 to compare on more images",
            file=sys.stderr,
        )


def _profile(config: "TrainingConfig", backbone: Path, vision: Path | None, steps: int) -> int:
    from mtlora.train.profile import MODEL_SECTIONS, profile_training
    from mtlora.train.trainer import Trainer

    with TemporaryDirectory(prefix="mtlora-profile-") as folder:
        found = profile_training(Trainer(config, backbone, Path(folder) / "run", vision=vision), steps)
    rows = [
        (name, "the model" if name in MODEL_SECTIONS else "", f"{share:.1%}")
        for name, share in found["sections"].items()
    ]
    title = (
        f"{steps} steps, {found['tokens_per_second']:.0f} tokens/s; a state is saved every {config.save_every} steps"
    )
    print_table(title, ("part of a step", "", "share of the time"), rows)
    operators = [(name, calls, f"{share:.1%}") for name, (share, calls) in found["operators"].items()]
    print_table("the most expensive operators", ("operator", "calls", "share of the time"), operators)
    return 0
