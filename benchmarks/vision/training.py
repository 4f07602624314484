"""Images a second of training ÷ those of the bare backbone's forward pass, in turns of as many images.

    python -m benchmarks.vision.training configs/vision.json --steps 8 --set threads=1

A training step decodes and changes its images too; the forward pass gets prepared ones.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mtlora.backbone import resolve
from mtlora.cli.settings import add_set_argument, read_settings
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer

_WARM_UP = 2


def measure(config: TrainingConfig, backbone: Path, steps: int) -> list[tuple[float, float]]:
    """(seconds of a training step, seconds of a forward pass of as many images), turn by turn."""
    found = []
    with tempfile.TemporaryDirectory(prefix="mtlora-bench-") as folder:
        trainer = Trainer(config, backbone, Path(folder))
        adapted, image = trainer.work.adapted, trainer.tasks[0].image
        assert image is not None
        for _ in range(_WARM_UP + steps):
            pixels_BCSS = torch.zeros(len(trainer.batches[trainer.step]), 3, image.size, image.size)
            begin = time.perf_counter()
            trainer.train_step()
            middle = time.perf_counter()
            with torch.inference_mode(), adapted.adapters.context.backbone_alone():
                adapted.features(pixels_BCSS, None, image.pooling)
            found.append((middle - begin, time.perf_counter() - middle))
    return found[_WARM_UP:]


def main() -> None:
    """Measure and print a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision.training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--backbone", default="vision")
    parser.add_argument("--steps", type=int, default=20)
    add_set_argument(parser)
    args = parser.parse_args()
    flags = ["examples_per_task=50", "probe_examples=20", "validation_per_task=0", *args.set]
    config = TrainingConfig.model_validate(read_settings(args.config, flags))
    turns = measure(config, resolve(args.backbone), args.steps)
    step, forward = (statistics.median(each) for each in zip(*turns, strict=True))
    ratio = statistics.median(forward / step for step, forward in turns)
    print(
        f"{config.batch_size} images: a training step {step:.3f} s, a forward pass {forward:.3f} s; "
        f"training ÷ forward: {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
