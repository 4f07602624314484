"""Writes a run's result: a checkpoint of the adapter or baseline, with provenance and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtlora.checkpoint.format import AdapterManifest, ProjectorConfig, TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.evaluation.answerers import Answerer
from mtlora.evaluation.scores import score
from mtlora.model.baseline import BaselineManifest, read_baseline_manifest, write_baseline
from mtlora.model.language import AdaptedModel, adapter_tensors
from mtlora.suite.base import Example
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig

if TYPE_CHECKING:
    from mtlora.model.vision import AdaptedEncoder


def task_table(config: TrainingConfig, tasks: Sequence[TaskSpec]) -> tuple[TaskEntry, ...]:
    """The checkpoint's task table: a bias row for each task, in order, where the method has task biases."""
    biased = config.baseline is None and config.adapter.task_bias
    return tuple(TaskEntry(**task.model_dump(), bias_index=i if biased else None) for i, task in enumerate(tasks))


def evaluation_of(
    config: TrainingConfig, examples: Sequence[Example], adapter: Answerer, backbone_alone: Answerer
) -> dict[str, Any]:
    """The manifest's `evaluation` on validation examples. Empty without examples."""
    if not examples:
        return {}
    return {
        "split": "validation",
        "examples_per_task": config.validation_per_task,
        "adapter": score(examples, adapter(examples)).as_dict(),
        "backbone_alone": score(examples, backbone_alone(examples)).as_dict(),
    }


def write_result(
    folder: Path,
    config: TrainingConfig,
    adapted: "AdaptedModel | AdaptedEncoder",
    tasks: Sequence[TaskSpec],
    *,
    training: dict[str, Any],
    evaluation: dict[str, Any],
    beside: Mapping[str, torch.Tensor] | None = None,
    projector: ProjectorConfig | None = None,
    calibration: Mapping[str, float] | None = None,
) -> None:
    """Write the checkpoint: an adapter's paths in float16, a baseline in float32. Raises CheckpointError.

    beside: tensors stored beside them as they are: those of heads or of the projector. calibration: temperatures by
    task, which baselines do not have.
    """
    contents: dict[str, Any] = {
        "backbone": adapted.backbone,
        "tasks": task_table(config, tasks),
        "training": training,
        "evaluation": evaluation,
    }
    dtype = torch.float16 if config.baseline is None else torch.float32
    tensors = {**adapter_tensors(adapted.adapters, dtype), **(beside or {})}
    if config.baseline is None:
        write_checkpoint(
            folder, config=config.adapter, tensors=tensors, projector=projector, calibration=calibration, **contents
        )
    else:
        write_baseline(folder, BaselineManifest(config=config.baseline, **contents), tensors)


def read_result(folder: Path, config: TrainingConfig) -> AdapterManifest | BaselineManifest:
    """The manifest that `write_result` wrote. Raises CheckpointError."""
    return read_manifest(folder) if config.baseline is None else read_baseline_manifest(folder)
