"""`make bench-training`: seconds of a training step of several configurations, on the same batches, in one process.

    python -m benchmarks.training configs/methods/full.json configs/methods/hydralora-qv.json

HydraLoRA is measured twice: with its experts one after the other, as its authors publish it, and as one product, as
this project computes blocks. An activated adapter is measured twice: once with eight tasks sharing a document's pass,
once with a pass per task; tokens are counted for every example. Configurations take turns, and ratios are medians over
turns, so that other load on the machine affects all of them alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from mtlora.cli.backbone import add_backbone_argument
from mtlora.cli.output import print_table
from mtlora.cli.settings import add_set_argument, read_settings
from mtlora.methods import HydraLoRAConfig
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer

_WARM_UP = 2
_SHARING = 8


def variants(files: list[Path], flags: list[str]) -> dict[str, TrainingConfig]:
    """The configurations by name. HydraLoRA and activated adapters stand twice."""
    found: dict[str, TrainingConfig] = {}
    for file in files:
        config = TrainingConfig.model_validate(read_settings(file, ["validation_per_task=0", *flags]))
        if isinstance(config.baseline, HydraLoRAConfig):
            for products in ("loop", "fused"):
                baseline = config.baseline.model_copy(update={"products": products})
                found[f"{file.stem} ({products})"] = config.model_copy(update={"baseline": baseline})
        elif config.adapter.activation == "task":
            for tasks in (_SHARING, 1):
                # Without sharing, a step reads a document per example, so fewer examples take as long.
                changed = {"document_tasks": tasks, "batch_size": 4 * tasks}
                told = f"{tasks} tasks a document" if tasks > 1 else "each by itself"
                found[f"{file.stem} ({told})"] = config.model_copy(update=changed)
        else:
            found[file.stem] = config
    return found


def measure(configs: dict[str, TrainingConfig], backbone: Path, steps: int) -> dict[str, list[tuple[float, int]]]:
    """(seconds, tokens) of every step of each configuration. All take a step before any takes the next."""
    with tempfile.TemporaryDirectory(prefix="mtlora-bench-") as folder:
        trainers = {
            name: Trainer(config, backbone, Path(folder) / str(i)) for i, (name, config) in enumerate(configs.items())
        }
        steps_of: dict[str, list[tuple[float, int]]] = {name: [] for name in trainers}
        for turn in range(_WARM_UP + steps):
            order = list(trainers.items())
            # The order changes, so that no configuration always runs after the same one.
            for name, trainer in order if turn % 2 else order[::-1]:
                begin = time.perf_counter()
                tokens = trainer.train_step().num_tokens
                if turn >= _WARM_UP:
                    steps_of[name].append((time.perf_counter() - begin, tokens))
    return steps_of


def report(steps: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    """Medians over steps, and over turns of the first configuration's seconds a token divided by these."""
    first = next(iter(steps.values()))
    return {
        name: {
            "median_seconds": statistics.median(seconds for seconds, _ in found),
            "tokens_per_second": statistics.median(tokens / seconds for seconds, tokens in found),
            "first_over_this": statistics.median(
                (seconds / tokens) / (its_seconds / its_tokens)
                for (seconds, tokens), (its_seconds, its_tokens) in zip(first, found, strict=True)
            ),
        }
        for name, found in steps.items()
    }


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help="compared with the first one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="OUT")
    add_backbone_argument(parser)
    add_set_argument(parser)
    args = parser.parse_args()
    from mtlora.backbone import resolve

    flags = ["examples_per_task=100", *args.set]
    found = report(measure(variants(args.configs, flags), resolve(args.backbone), args.steps))
    first = next(iter(found))
    rows = [
        (
            name,
            f"{row['median_seconds']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['first_over_this'] - 1:+.0%}",
            f"{1 / row['first_over_this']:.2f}",
        )
        for name, row in found.items()
    ]
    headings = ("configuration", "seconds a step", "tokens a second", f"{first} against it", "its speed ÷ this")
    print_table(f"{args.steps} steps", headings, rows)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
