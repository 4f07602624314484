"""Training that begins at given weights and may change only a part of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


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
