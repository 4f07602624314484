"""`make bench-training`: seconds of a training step of several configurations, on the same batches, in one process.

    python -m benchmarks.training configs/methods/full.json configs/methods/hydralora-qv.json

HydraLoRA is measured twice: with its experts one after the other, as its authors publish it, and as one product, as
this project computes blocks. Configurations take turns, and ratios are medians over turns, so that other load on the
machine affects all of them alike.
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


def variants(files: list[Path], flags: list[str]) -> dict[str, TrainingConfig]:
    """The configurations by name. HydraLoRA stands twice."""
    found: dict[str, TrainingConfig] = {}
    for file in files:
        config = TrainingConfig.model_validate(read_settings(file, ["validation_per_task=0", *flags]))
        if isinstance(config.baseline, HydraLoRAConfig):
            for products in ("loop", "fused"):
                baseline = config.baseline.model_copy(update={"products": products})
                found[f"{file.stem} ({products})"] = config.model_copy(update={"baseline": baseline})
        else:
            found[file.stem] = config
    return found


def measure(configs: dict[str, TrainingConfig], backbone: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of each configuration. All take a step before any takes the next."""
    with tempfile.TemporaryDirectory(prefix="mtlora-bench-") as folder:
        trainers = {
            name: Trainer(config, backbone, Path(folder) / str(i)) for i, (name, config) in enumerate(configs.items())
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for turn in range(_WARM_UP + steps):
            order = list(trainers.items())
            # The order changes, so that none always runs on the caches that another left.
            for name, trainer in order if turn % 2 else order[::-1]:
                begin = time.perf_counter()
                trainer.train_step()
                if turn >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds a step, and the median over turns of the first configuration's seconds divided by these."""
    first = next(iter(seconds.values()))
    return {
        name: {
            "median_seconds": statistics.median(found),
            "first_over_this": statistics.median(a / b for a, b in zip(first, found, strict=True)),
        }
        for name, found in seconds.items()
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
    rows = [(name, f"{row['median_seconds']:.3f}", f"{row['first_over_this'] - 1:+.0%}") for name, row in found.items()]
    print_table(f"{args.steps} steps", ("configuration", "seconds a step", f"{first} against it"), rows)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
