"""The steps of a merge: train the new task, extend the adapter, compare the old tasks, write."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mtlora.checkpoint.format import AdapterManifest, Checkpoint, format_version, head_names
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import check_replaceable, write_checkpoint
from mtlora.merge.compare import Comparison, compare, compare_images
from mtlora.merge.extend import MergeError, extended_config, merged_tasks, merged_tensors, new_task, starting_point
from mtlora.suite import up_to
from mtlora.task import check_activation
from mtlora.train.config import TrainingConfig
from mtlora.train.examples import load_run_suite

Mode = Literal["bias", "experts"]

# Default training settings of each mode. One task needs no balance between experts. Its examples are few, so small
# batches give more steps: two epochs of 500 examples reached 0.99 with batches of 4; joint training reached 0.96.
# Biases need a higher learning rate than weights.
SETTINGS: dict[Mode, dict[str, Any]] = {
    "bias": {
        "epochs": 3, "batch_size": 4, "balance_weight": 0.0, "spectral": "off", "router_learning_rate_scale": 10.0,
    },
    "experts": {"epochs": 3, "batch_size": 4, "balance_weight": 0.0},
}  # fmt: skip
NEW_EXPERTS = 2

_COMPARED_TEXTS = 4
# The largest allowed difference from rounding over a model's depth, as a share of the largest logit.
_ROUNDING = 1e-3


def merge(before: Checkpoint, backbone: Path, out: Path, config: TrainingConfig) -> tuple[AdapterManifest, Comparison]:
    """Add the one task that `config` names to an adapter made beside `backbone`; write the result to `out`.

    config: `config.adapter` is the checkpoint's `extended_config`; without new experts the mode is `bias`. Returns the
    new manifest and the old tasks' comparison. Raises MergeError, with nothing written, if an old task's outputs are
    not bit-identical (mode `bias`) or differ by more than rounding (mode `experts`); training and writing may raise
    other errors.
    """
    new_experts = config.adapter.num_experts - before.manifest.config.num_experts
    mode: Mode = "experts" if new_experts else "bias"
    check_replaceable(out.resolve())
    if before.manifest.projector is not None:
        raise MergeError("the adapter has tasks that take text and an image; allowed: tasks of text, or of images")
    (task_id,) = config.tasks or ()
    suite = load_run_suite(config)
    task = new_task(before, suite, task_id)
    check_activation(config.adapter, [task])
    if config.adapter != extended_config(before, new_experts):
        raise MergeError("adapter: the adapter's own hyper-parameters stay as they are")
    examples = up_to(suite, task_id, "train", _COMPARED_TEXTS, config.seed)
    learned, trained = train_task(before, config, backbone, new_experts)
    old = before.manifest
    earlier = old.training.get("merged")
    history = [
        *(earlier if isinstance(earlier, list) else ()),
        {"task": task_id, "mode": mode, "new_experts": new_experts, **trained.training},
    ]
    tasks = merged_tasks(before, task)
    contents: dict[str, Any] = {
        "backbone": old.backbone,
        "config": config.adapter,
        "tasks": tasks,
        "training": old.training | {"merged": history},
        "evaluation": _with_scores(old.evaluation, trained.evaluation),
        "calibration": old.calibration | trained.calibration,
    }
    tensors = merged_tensors(before, learned)
    version = format_version(config.adapter, tasks)
    after = Checkpoint(AdapterManifest(format_version=version, **contents, tensors_sha256="0" * 64), tensors)
    if old.images:
        comparison = compare_images(backbone, before, after, examples)
    else:
        comparison = compare(backbone, before, after, [example.input for example in examples])
    allowed = 0.0 if mode == "bias" else _ROUNDING * comparison.largest_logit
    if (mode == "bias" and not comparison.identical) or not comparison.largest_difference <= allowed:
        raise MergeError(
            f"not written: {comparison.differing} of {comparison.logits} logits of the old tasks differ, by up to "
            f"{comparison.largest_difference:.2g}; expected {'none' if mode == 'bias' else f'at most {allowed:.2g}'}"
        )
    return write_checkpoint(out, tensors=tensors, **contents), comparison


def _with_scores(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Add the new task's scores to the old tasks' scores, which are still valid. Replaces scores in an unknown form."""
    merged: dict[str, Any] = dict(old)
    for name in ("adapter", "backbone_alone"):
        if name not in new:
            continue
        try:
            tasks = {**old[name]["tasks"], **new[name]["tasks"]}
            mean = sum(score["accuracy"] for score in tasks.values()) / len(tasks)
        except (KeyError, TypeError):
            merged[name] = new[name]
        else:
            merged[name] = {"mean_accuracy": round(mean, 4), "tasks": tasks}
    return merged


def train_task(
    checkpoint: Checkpoint, config: TrainingConfig, backbone: Path, new_experts: int
) -> tuple[dict[str, torch.Tensor], AdapterManifest]:
    """Train the one task that `config` names; returns the learned tensors and the run's manifest.

    Raises MergeError for weight decay, which would move frozen weights, and the trainer's errors.
    """
    from mtlora.train.trainer import Trainer

    if config.weight_decay:
        raise MergeError(f"weight_decay: expected 0, found {config.weight_decay}: it would move frozen weights")
    start = starting_point(checkpoint, new_experts, torch.Generator().manual_seed(config.seed))
    with tempfile.TemporaryDirectory(prefix="mtlora-merge-") as folder:
        trainer = Trainer(config, backbone, Path(folder) / "run", start=start)
        trainer.fit()
        learned = {name: tensor.detach().clone() for name, tensor in trainer.adapted.adapters.state_dict().items()}
        trained = read_checkpoint(Path(folder) / "run" / "adapter")
        if checkpoint.manifest.images:
            (task_id,) = config.tasks or ()
            learned |= dict(zip(head_names(0), trained.head(task_id), strict=True))
    return learned, trained.manifest
