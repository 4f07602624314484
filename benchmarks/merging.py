"""A task added by `mtlora merge` compared with the same task trained jointly, and the effect on the other tasks.

Trains one adapter on all tasks and another on all but the new one, then merges the new task into the second in both
modes. Every training sees each example equally often. Accuracy is on the new task's test split.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mtlora.backbone import resolve
from mtlora.checkpoint.read import read_checkpoint
from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.output import print_table
from mtlora.evaluation.offline import offline_answerer
from mtlora.evaluation.scores import score
from mtlora.merge.extend import extended_config
from mtlora.merge.merge import NEW_EXPERTS, SETTINGS, Mode, merge
from mtlora.model.language import load_adapted_model
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer

_OLD = ("list_operations", "unit_conversion", "word_sorting")
_NEW = "amount_normalisation"
GOAL = 0.9


def main() -> int:
    """Train, merge, print a row each. Returns 1 if neither mode reaches the goal, or if a frozen task changes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    add_backbone_argument(parser)
    parser.add_argument("--old", nargs="+", default=list(_OLD), metavar="TASK", help="built-in tasks to begin with")
    parser.add_argument("--new", default=_NEW, metavar="TASK", help="the built-in task to add")
    parser.add_argument("--examples", type=int, default=500, help="training examples a task; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test-examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("out/bench/merging.json"))
    args = parser.parse_args()
    folder = resolve(args.backbone)
    test = load_suite("builtin").examples(args.new, "test", args.test_examples, args.seed)
    shared = {
        "examples_per_task": args.examples, "validation_per_task": 0, "epochs": args.epochs, "seed": args.seed,
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mtlora-bench-") as temporary:
        root = Path(temporary)
        for name, tasks in (("joint", (*args.old, args.new)), ("before", tuple(args.old))):
            began = time.monotonic()
            Trainer(TrainingConfig(tasks=tasks, **shared), folder, root / name).fit()
            rows[name] = {"seconds": round(time.monotonic() - began, 1)}
        rows["joint"]["accuracy"] = accuracy(folder, root / "joint" / "adapter", test)
        before = read_checkpoint(root / "before" / "adapter")
        modes: tuple[Mode, ...] = ("bias", "experts")
        for mode in modes:
            extended = extended_config(before, NEW_EXPERTS if mode == "experts" else 0)
            config = TrainingConfig(adapter=extended, tasks=(args.new,), **(SETTINGS[mode] | shared))
            began = time.monotonic()
            _, compared = merge(before, folder, root / mode, config)
            rows[mode] = {
                "seconds": round(time.monotonic() - began, 1),
                "accuracy": accuracy(folder, root / mode, test),
                "old_logits": compared.logits,
                "old_logits_differing": compared.differing,
                "old_largest_difference": compared.largest_difference,
            }
            rows[mode]["of_joint"] = rows[mode]["accuracy"] / max(rows["joint"]["accuracy"], 1e-9)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}, indent=1) + "\n")
    print_table(
        f"{args.new} added to {len(args.old)} tasks",
        ("adapter", "seconds", "accuracy", "of joint", "old tasks' logits that differ"),
        [
            (
                name,
                f"{row['seconds']:.0f}",
                f"{row['accuracy']:.2f}" if "accuracy" in row else "",
                f"{row['of_joint']:.2f}" if "of_joint" in row else "",
                f"{row['old_logits_differing']} of {row['old_logits']}" if "old_logits" in row else "",
            )
            for name, row in rows.items()
        ],
    )
    best = max(rows[mode]["of_joint"] for mode in modes)
    print(f"bench: merged/joint accuracy of the new task {best:.2f} (goal {GOAL})")
    return int(best < GOAL or rows["bias"]["old_logits_differing"] > 0)


def accuracy(folder: Path, adapter: Path, examples: list[Example]) -> float:
    """Share of right answers with the adapter in a folder."""
    checkpoint = read_checkpoint(adapter)
    adapted = load_adapted_model(folder, checkpoint, torch.bfloat16)
    return score(examples, offline_answerer(adapted, checkpoint.manifest.tasks)(examples)).mean


if __name__ == "__main__":
    raise SystemExit(main())
