"""The settings of a run that its user leaves open, by the kind of its suite."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from mtlora.suite import Suite
from mtlora.suite.base import up_to
from mtlora.suite.mix import count_for
from mtlora.train.config import TrainingConfig
from mtlora.train.examples import chosen_tasks
from mtlora.vision.families import read_config

# Images, beside `TrainingConfig`'s own defaults, which are for texts. Heads start well: a high rate would spoil them.
IMAGES: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 5e-4,
    "head_learning_rate_scale": 0.2,
    "validation_per_task": 32,
    "validate_every": 100,
}
# A large task must not swamp the others: its images in an epoch, as a multiple of the median over tasks.
_MOST_OF_MEDIAN = 4
# Steps of a run on images at least: small suites are seen several times.
_STEPS = 800


def training_config(settings: Mapping[str, Any], suite: Suite, backbone: Path) -> TrainingConfig:
    """The configuration of settings, completed by what suits the suite's kind of input.

    Raises ValidationError for wrong settings, SuiteError for tasks that the suite lacks, BackboneError for a backbone
    that sees no images.
    """
    config = TrainingConfig.model_validate(settings)
    tasks = chosen_tasks(suite, config.tasks)
    if not any(task.image for task in tasks):
        return config
    completed = {**IMAGES, **settings}
    if suite.finite:
        completed = {"examples_per_task": None, **completed}
    if config.baseline is None:
        # The first half's features suit most images, and a step takes little more than half of the time.
        completed = {"frozen_layers": read_config(backbone).num_layers // 2, **completed}
    config = TrainingConfig.model_validate(completed)
    if "epochs" in settings:
        return config
    asked = [count_for(config.examples_per_task, task.id) for task in tasks]
    counts = [len(up_to(suite, task.id, "train", count, config.seed)) for task, count in zip(tasks, asked, strict=True)]
    most = most_shown(config, counts)
    steps = math.ceil(sum(min(count, most) for count in counts) / config.batch_size)
    return config.model_copy(update={"epochs": math.ceil((config.max_steps or _STEPS) / max(1, steps))})


def most_shown(config: TrainingConfig, counts: Collection[int]) -> float:
    """Images of a task that an epoch shows at most, of tasks with so many. Numbers that a user gave are kept."""
    return _MOST_OF_MEDIAN * median(counts) if config.examples_per_task is None and counts else math.inf
