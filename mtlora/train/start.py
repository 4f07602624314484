"""Training that begins at given weights: all of them another checkpoint's, or a part of them to be left as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.model import AdaptedModel
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingError


@dataclass(frozen=True)
class StartingPoint:
    """Weights to begin with, and which of their entries a run may change; names are the adapter's own.

    trainable: a boolean mask of each tensor's shape. What is not trainable keeps its bits, so long as the optimizer
    moves nothing but by its gradient: without weight decay.
    """

    tensors: Mapping[str, torch.Tensor]
    trainable: Mapping[str, torch.Tensor]

    def apply(self, adapters: nn.Module) -> None:
        """Load the weights, keep gradients off what is frozen. Raises RuntimeError for other names or shapes."""
        adapters.load_state_dict(dict(self.tensors))
        for name, parameter in adapters.named_parameters():
            frozen = ~self.trainable[name]
            if frozen.all():
                parameter.requires_grad_(False)
            elif frozen.any():
                parameter.register_hook(lambda grad, frozen=frozen: grad.masked_fill(frozen, 0.0))


def warm_start(adapted: AdaptedModel, config: MtLoRAConfig, tasks: Sequence[TaskSpec], checkpoint: Path) -> None:
    """Give the adapter a checkpoint's weights; task biases go by task id, and a task it has not keeps a zero bias.

    Raises CheckpointError where it cannot be read or was made beside another backbone, TrainingError where its config
    gives tensors of other shapes or another meaning.
    """
    found = read_checkpoint(checkpoint, adapted.backbone)
    differing = [
        f"{name}: {getattr(found.manifest.config, name)!r} there, {getattr(config, name)!r} here"
        for name in MtLoRAConfig.model_fields
        if name != "lora_dropout" and getattr(found.manifest.config, name) != getattr(config, name)
    ]
    if differing:
        raise TrainingError(f"init_from {checkpoint}: expected the same adapter config; {'; '.join(differing)}")
    rows = {task.id: task.bias_index for task in found.manifest.tasks}
    state = adapted.adapters.state_dict()
    for name, tensor in found.tensors.items():
        if not name.endswith(".task_bias"):
            state[name] = tensor.float()
            continue
        for row, task in enumerate(tasks):
            if (source := rows.get(task.id)) is not None:
                state[name][row] = tensor[source].float()
    adapted.adapters.load_state_dict(state)
