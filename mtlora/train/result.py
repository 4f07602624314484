"""Writes a run's result: a checkpoint of the adapter or baseline, with provenance and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtlora.checkpoint.format import PROJECTOR_NAMES, AdapterManifest, TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.evaluation.offline import offline_answerer
from mtlora.evaluation.scores import score
from mtlora.model.baseline import BaselineManifest, read_baseline_manifest, write_baseline
from mtlora.model.language import AdaptedModel, adapter_tensors
from mtlora.suite.base import Example
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig


def task_table(config: TrainingConfig, tasks: Sequence[TaskSpec]) -> tuple[TaskEntry, ...]:
    """The checkpoint's task table: a bias row for each task, in order, where the method has task biases."""
    biased = config.baseline is None and config.adapter.task_bias
    return tuple(TaskEntry(**task.model_dump(), bias_index=i if biased else None) for i, task in enumerate(tasks))


def evaluate(
    adapted: AdaptedModel, table: Sequence[TaskEntry], examples: Sequence[Example], examples_per_task: int
) -> dict[str, Any]:
    """The manifest's `evaluation` on validation examples: adapter and backbone alone. Empty without examples."""
    if not examples:
        return {}
    answers = offline_answerer(adapted, table)(examples)
    alone = offline_answerer(adapted, table, with_adapter=False)(examples)
    return {
        "split": "validation",
        "examples_per_task": examples_per_task,
        "adapter": score(examples, answers).as_dict(),
        "backbone_alone": score(examples, alone).as_dict(),
    }


def write_result(
    folder: Path, config: TrainingConfig, adapted: AdaptedModel, table: tuple[TaskEntry, ...],
    training: dict[str, Any], evaluation: dict[str, Any],
) -> None:  # fmt: skip
    """Write the checkpoint: an adapter's paths in float16, all else in float32. Raises CheckpointError."""
    if config.baseline is None:
        tensors, projector = adapter_tensors(adapted.adapters, torch.float16), None
        if adapted.reader is not None:
            projector = adapted.reader.projector_config
            tensors |= dict(zip(PROJECTOR_NAMES, adapted.reader.projector.folded(), strict=True))
        write_checkpoint(
            folder, backbone=adapted.backbone, config=config.adapter, tasks=table, training=training,
            evaluation=evaluation, tensors=tensors, projector=projector,
        )  # fmt: skip
    else:
        manifest = BaselineManifest(
            backbone=adapted.backbone, config=config.baseline, tasks=table, training=training, evaluation=evaluation
        )
        write_baseline(folder, manifest, adapter_tensors(adapted.adapters, torch.float32))


def read_result(folder: Path, config: TrainingConfig) -> AdapterManifest | BaselineManifest:
    """The manifest that `write_result` wrote. Raises CheckpointError."""
    return read_manifest(folder) if config.baseline is None else read_baseline_manifest(folder)
