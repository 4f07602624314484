"""The settings of a run that its user leaves open, by the kind of its suite."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from mtlora.checkpoint.read import read_manifest
from mtlora.suite import Suite
from mtlora.suite.base import up_to
from mtlora.suite.mix import count_for
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.examples import chosen_tasks

# A new adapter beside plain texts. A trained one, baselines, documents and texts with an image have measured recipes at
# `TrainingConfig`'s lower rate.
NEW_FOR_TEXTS: dict[str, Any] = {"learning_rate": 5e-3}
# Images.
IMAGES: dict[str, Any] = {"batch_size": 32, "validation_per_task": 32, "validate_every": 100}
# Adapters of images, more accurate than those of one block or of one rate for all layers (docs/training.md).
ADAPTERS_OF_IMAGES: dict[str, Any] = {"learning_rate": 1e-3, "relative_expert_rate": 2.0}
# Baselines. Higher rates, as for adapters, were not tried as defaults.
BASELINES_OF_IMAGES: dict[str, Any] = {"learning_rate": 5e-4, "head_learning_rate_scale": 0.2}
# A large task must not swamp the others: its images in an epoch, as a multiple of the median over tasks.
_MOST_OF_MEDIAN = 4
# Steps of a run at least: small suites are seen several times. A single task of texts needs fewer.
_STEPS = 800
_STEPS_OF_A_TEXT_TASK = 200


def training_config(settings: Mapping[str, Any], suite: Suite) -> TrainingConfig:
    """The configuration of settings, completed by what suits the suite's kind of input.

    Raises ValidationError for wrong settings, SuiteError for tasks that the suite lacks, CheckpointError for an adapter
    of images to start from that cannot be read.
    """
    config = TrainingConfig.model_validate(settings)
    tasks = chosen_tasks(suite, config.tasks)
    images = any(task.image for task in tasks)
    if images:
        rates = ADAPTERS_OF_IMAGES if config.baseline is None else BASELINES_OF_IMAGES
        amount = {"examples_per_task": None} if suite.finite else {}
        adapter = {"adapter": _adapter_of_images(config, settings)} if config.baseline is None else {}
        config = TrainingConfig.model_validate({**IMAGES, **rates, **amount, **settings, **adapter})
    elif _new_for_texts(config, tasks):
        config = TrainingConfig.model_validate({**NEW_FOR_TEXTS, **settings})
    if "epochs" in settings:
        return config
    counts = [_examples(config, suite, task.id) for task in tasks]
    most = most_shown(config, counts) if images else math.inf
    steps = math.ceil(sum(min(count, most) for count in counts) / config.batch_size)
    wanted = config.max_steps or (_STEPS if images else min(_STEPS, _STEPS_OF_A_TEXT_TASK * len(tasks)))
    return config.model_copy(update={"epochs": math.ceil(wanted / max(1, steps))})


def _adapter_of_images(config: TrainingConfig, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapter's settings: those given; else those of the checkpoint to start from, or paths beside both blocks."""
    adapter: dict[str, Any] = {"blocks": "both"}
    if config.init_from is not None:
        adapter = read_manifest(Path(config.init_from)).config.model_dump()
    return adapter | settings.get("adapter", {})


def _new_for_texts(config: TrainingConfig, tasks: Iterable[TaskSpec]) -> bool:
    """Whether a run trains a new adapter for texts without images, with paths on all tokens."""
    new = config.baseline is None and config.init_from is None
    return new and config.adapter.activation == "all" and not any(task.picture for task in tasks)


def _examples(config: TrainingConfig, suite: Suite, task_id: str) -> int:
    """Training examples of a task in an epoch."""
    asked = count_for(config.examples_per_task, task_id)
    if asked is not None and isinstance(config.suite, str) and not suite.finite:
        return asked
    return len(up_to(suite, task_id, "train", asked, config.seed))


def most_shown(config: TrainingConfig, counts: Collection[int]) -> float:
    """Images of a task that an epoch shows at most, of tasks with so many. Numbers that a user gave are kept."""
    return _MOST_OF_MEDIAN * median(counts) if config.examples_per_task is None and counts else math.inf
