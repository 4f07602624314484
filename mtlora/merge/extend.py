"""Extends an adapter's config, tensors and task table by one task.

Shape suffixes: N experts, M new experts, D hidden size, r rank, G groups, b tasks.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import ValidationError

from mtlora.checkpoint.format import Checkpoint, TaskEntry, head_names
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError, describe
from mtlora.suite.base import Suite, unknown_task
from mtlora.task import TaskSpec
from mtlora.train.start import StartingPoint

# Router bias of an expert that a task must not use. A power of two, so exact in every dtype of a checkpoint. The
# softmax weight is zero in float32, unless router logits differ by more than 32,000.
CLOSED = -32768.0


class MergeError(MtLoRAError):
    """A task that cannot be added; the message says why."""


def extended_config(checkpoint: Checkpoint, new_experts: int) -> MtLoRAConfig:
    """The adapter's config with `new_experts` more experts, and with task biases. Raises MergeError."""
    config = checkpoint.manifest.config
    if config.num_experts + new_experts == 1:
        raise MergeError("found an adapter of one expert, which has no router for a bias; allowed: --mode experts")
    changed = {"num_experts": config.num_experts + new_experts, "task_bias": True}
    try:
        return MtLoRAConfig.model_validate(config.model_dump() | changed)
    except ValidationError as error:
        raise MergeError(f"{new_experts} new experts beside {config.num_experts}: {describe(error)}") from None


def starting_point(checkpoint: Checkpoint, new_experts: int, generator: torch.Generator) -> StartingPoint:
    """A one-task adapter to train: new experts zero, new router rows random, bias the mean of the old tasks'."""
    config, tensors = checkpoint.manifest.config, checkpoint.tensors
    N, G = config.num_experts, config.num_groups
    start: dict[str, torch.Tensor] = {}
    trainable: dict[str, torch.Tensor] = {}
    for name in _blocks(checkpoint):
        lora_A_rD, lora_B_NDr = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
        D = lora_A_rD.shape[1]
        route_GND = tensors[f"{name}.lora_route"].float().view(G, N, D)
        # Initialise as in a fresh adapter: uniform within 1 / sqrt(D).
        fresh_GMD = (2 * torch.rand(G, new_experts, D, generator=generator) - 1) / math.sqrt(D)
        bias_GN = torch.zeros(G, N)
        if config.task_bias:
            bias_bGN = tensors[f"{name}.task_bias"].float()
            open_bGN = bias_bGN > CLOSED / 2
            bias_GN = (bias_bGN * open_bGN).sum(0) / open_bGN.sum(0).clamp_min(1)
        start |= {
            f"{name}.lora_A": lora_A_rD,
            f"{name}.lora_B": torch.cat([lora_B_NDr, lora_B_NDr.new_zeros(new_experts, *lora_B_NDr.shape[1:])]),
            f"{name}.lora_route": torch.cat([route_GND, fresh_GMD], dim=1).flatten(0, 1),
            f"{name}.task_bias": torch.cat([bias_GN, torch.zeros(G, new_experts)], dim=1).unsqueeze(0),
        }
        new_N = torch.arange(N + new_experts) >= N
        trainable |= {
            f"{name}.lora_A": torch.zeros_like(lora_A_rD, dtype=torch.bool),
            f"{name}.lora_B": new_N.view(-1, 1, 1).expand_as(start[f"{name}.lora_B"]),
            f"{name}.lora_route": new_N.repeat(G).unsqueeze(1).expand_as(start[f"{name}.lora_route"]),
            f"{name}.task_bias": torch.ones(1, G, N + new_experts, dtype=torch.bool),
        }
    return StartingPoint(start, trainable)


def merged_tensors(checkpoint: Checkpoint, learned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors followed by the learned ones, each in its old dtype.

    learned: the trained `starting_point` of this checkpoint; for an image task, also its head.
    """
    config, tensors = checkpoint.manifest.config, checkpoint.tensors
    N, G, b = config.num_experts, config.num_groups, len(checkpoint.manifest.tasks)
    merged: dict[str, torch.Tensor] = {}
    for name in _blocks(checkpoint):
        lora_B_NDr, lora_route = tensors[f"{name}.lora_B"], tensors[f"{name}.lora_route"]
        D = lora_route.shape[1]
        new_route_GMD = learned[f"{name}.lora_route"].view(G, -1, D)[:, N:].to(lora_route.dtype)
        if config.task_bias:
            bias_bGN = tensors[f"{name}.task_bias"]
        else:
            # A missing bias means zero.
            bias_bGN = lora_route.new_zeros(b, G, N)
        closed_bGM = bias_bGN.new_full((b, G, new_route_GMD.shape[1]), CLOSED)
        merged |= {
            f"{name}.lora_A": tensors[f"{name}.lora_A"],
            f"{name}.lora_B": torch.cat([lora_B_NDr, learned[f"{name}.lora_B"][N:].to(lora_B_NDr.dtype)]),
            f"{name}.lora_route": torch.cat([lora_route.view(G, N, D), new_route_GMD], dim=1).flatten(0, 1),
            f"{name}.task_bias": torch.cat(
                [torch.cat([bias_bGN, closed_bGM], dim=2), learned[f"{name}.task_bias"].to(bias_bGN.dtype)]
            ),
        }
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}
    for old, new in zip(head_names(0), head_names(b), strict=True):
        if old in learned:
            heads[new] = learned[old].to(heads[old].dtype)
    return merged | heads


def merged_tasks(checkpoint: Checkpoint, task: TaskSpec) -> tuple[TaskEntry, ...]:
    """The task table with the new task as its last bias row."""
    old = checkpoint.manifest.tasks
    if not checkpoint.manifest.config.task_bias:
        old = tuple(entry.model_copy(update={"bias_index": i}) for i, entry in enumerate(old))
    return (*old, TaskEntry(**task.model_dump(exclude={"bias_index"}), bias_index=len(old)))


def new_task(checkpoint: Checkpoint, suite: Suite, task_id: str) -> TaskSpec:
    """The suite's task. Raises SuiteError if the suite lacks it, MergeError if the adapter has it."""
    if any(entry.id == task_id for entry in checkpoint.manifest.tasks):
        raise MergeError(f"the adapter has a task {task_id!r} already; allowed: a new id")
    for task in suite.tasks:
        if task.id == task_id:
            if (task.image is not None) != checkpoint.manifest.images:
                kinds = ("images", "text") if checkpoint.manifest.images else ("text", "images")
                raise MergeError(f"task {task_id}: the adapter's tasks take {kinds[0]}, this one takes {kinds[1]}")
            return task
    raise unknown_task(suite, task_id)


def _blocks(checkpoint: Checkpoint) -> Iterator[str]:
    for layer in range(checkpoint.manifest.backbone.num_layers):
        for module in checkpoint.manifest.config.modules:
            yield f"layers.{layer}.{module}"
