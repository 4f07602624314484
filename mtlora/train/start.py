"""Starts training from given weights: those of another checkpoint, or partly frozen ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mtlora.checkpoint.format import Checkpoint
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.errors import differences
from mtlora.model.language import AdaptedModel
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingError


@dataclass(frozen=True)
class StartingPoint:
    """Weights to start from, and which of their entries a run may change; names are those of the adapter.

    trainable: a boolean mask of each tensor's shape. Other entries keep their bits, if there is no weight decay: the
    optimizer then moves entries by their gradient alone.
    """

    tensors: Mapping[str, torch.Tensor]
    trainable: Mapping[str, torch.Tensor]

    def apply(self, adapters: nn.Module) -> None:
        """Load the weights and stop gradients at frozen entries. Raises RuntimeError for other names or shapes."""
        adapters.load_state_dict(dict(self.tensors))
        for name, parameter in adapters.named_parameters():
            frozen = ~self.trainable[name]
            if frozen.all():
                parameter.requires_grad_(False)
            elif frozen.any():
                parameter.register_hook(lambda grad, frozen=frozen: grad.masked_fill(frozen, 0.0))


def warm_start(adapted: AdaptedModel, config: MtLoRAConfig, tasks: Sequence[TaskSpec], checkpoint: Path) -> None:
    """Load a checkpoint's weights; task biases are matched by task id, and a new task keeps a zero bias.

    Raises CheckpointError if it cannot be read or was made beside another backbone, TrainingError if its config gives
    tensors another shape or meaning.
    """
    found = read_checkpoint(checkpoint, adapted.backbone)
    load_paths(adapted.adapters, found, config, tasks, checkpoint)


def load_paths(
    adapters: nn.Module, found: Checkpoint, config: MtLoRAConfig, tasks: Sequence[TaskSpec], where: Path
) -> None:
    """Load a checkpoint's paths; `where` is its folder. Raises TrainingError."""
    differing = differences(found.manifest.config, config)
    differing.pop("lora_dropout", None)
    if differing:
        told = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, (there, here) in differing.items())
        raise TrainingError(f"init_from {where}: expected the same adapter config; {told}")
    rows = {task.id: task.bias_index for task in found.manifest.tasks}
    state = adapters.state_dict()
    for name, tensor in found.paths.items():
        if not name.endswith(".task_bias"):
            state[name] = tensor.float()
            continue
        for row, task in enumerate(tasks):
            if (source := rows.get(task.id)) is not None:
                state[name][row] = tensor[source].float()
    adapters.load_state_dict(state)
