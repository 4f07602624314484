"""`mtlora merge`: add a task to an adapter without changing its other tasks."""

import argparse
import os
from pathlib import Path
from typing import Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.settings import add_set_argument, read_settings

_EXAMPLES = 1000
_VALIDATION = 16


def add_parser(subparsers: Any) -> None:
    """Add the command `merge`."""
    parser = subparsers.add_parser(
        "merge",
        help="add a task to an adapter without moving its other tasks",
        description="Trains one task with the adapter's weights frozen, compares the other tasks' outputs "
        "before and after, and writes the adapter with one task more to OUT.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a checkpoint")
    parser.add_argument("--task", required=True, metavar="NEW", help="the task's id in the suite")
    parser.add_argument("--suite", required=True, metavar="S", help="'builtin' or a folder of task files that has it")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="the new checkpoint's folder")
    parser.add_argument(
        "--mode",
        choices=("bias", "experts"),
        default="bias",
        help="bias: a new mix of the existing experts; experts: also new experts, which only the new task uses",
    )
    parser.add_argument("--new-experts", type=int, metavar="M", help="with --mode experts; default: 2")
    add_backbone_argument(parser)
    add_set_argument(parser)
    parser.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> int:
    # Let waiting threads sleep. Threads that spin beside other work make training ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.cli.scores import print_scores
    from mtlora.merge.extend import MergeError, extended_config, new_task
    from mtlora.merge.merge import NEW_EXPERTS, SETTINGS, merge
    from mtlora.suite import load_suite
    from mtlora.train.config import TrainingConfig

    if args.mode == "bias" and args.new_experts is not None:
        raise MergeError("--new-experts goes with --mode experts")
    new_experts = 0 if args.mode == "bias" else NEW_EXPERTS if args.new_experts is None else args.new_experts
    if args.mode == "experts" and new_experts < 1:
        raise MergeError(f"--new-experts: expected at least 1, found {new_experts}")
    folder = resolve(args.backbone)
    checkpoint = read_checkpoint(args.adapter, identify(folder))
    suite = load_suite(args.suite)
    task = new_task(checkpoint, suite, args.task)
    settings: dict[str, Any] = {**SETTINGS[args.mode], **_counts(suite, task.id), **read_settings(None, args.set)}
    if taken := {"adapter", "baseline", "suite", "tasks"} & settings.keys():
        raise MergeError(f"--set {min(taken)}: given by ADAPTER, --suite and --task")
    config = TrainingConfig.model_validate(
        settings | {"adapter": extended_config(checkpoint, new_experts), "suite": args.suite, "tasks": (task.id,)}
    )
    manifest, comparison = merge(checkpoint, folder, args.out, config)
    scores = {name: _only(task.id, manifest.evaluation.get(name)) for name in ("adapter", "backbone_alone")}
    if scores["adapter"]:
        print_scores({name: score for name, score in scores.items() if score})
    if comparison.identical:
        verdict = "bit-identical before and after"
    else:
        share = comparison.differing / comparison.logits
        verdict = (
            f"equal to rounding: {share:.1%} differ, by at most {comparison.largest_difference:.1e} beside a largest "
            f"logit of {comparison.largest_logit:.1f}"
        )
    inputs = "images" if manifest.images else "prompts"
    print(
        f"other tasks: {comparison.tasks} tasks, {comparison.prompts} {inputs}, "
        f"{comparison.logits:,} logits in float32: {verdict}"
    )
    print(args.out)
    return 0


def _counts(suite: Any, task_id: str) -> dict[str, Any]:
    """Example counts: a default number for a generated suite, all examples of a folder."""
    if not suite.finite:
        return {"examples_per_task": _EXAMPLES, "validation_per_task": _VALIDATION}
    validation = len(suite.examples(task_id, "validation", None))
    return {"examples_per_task": None, "validation_per_task": validation}


def _only(task_id: str, scores: Any) -> dict[str, Any] | None:
    try:
        score = scores["tasks"][task_id]
        return {"mean_accuracy": score["accuracy"], "tasks": {task_id: score}}
    except (KeyError, TypeError):
        return None
