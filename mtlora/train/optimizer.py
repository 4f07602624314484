"""The optimizer and its schedule."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from mtlora.train.config import TrainingConfig


def make_optimizer(
    trained: nn.Module, config: TrainingConfig, own_scales: Mapping[nn.Parameter, float]
) -> torch.optim.Optimizer:
    """AdamW over the parameters that need gradients, in groups whose `scale` is a factor on the learning rate.

    own_scales: the factors of experts that do not have their group's.
    """
    # Saved states number the parameters by this order.
    settings = {
        "experts": (1.0, config.weight_decay),
        "routing": (config.router_learning_rate_scale, 0.0),
        "projector": (config.projector_learning_rate_scale, config.weight_decay),
        "heads": (config.head_learning_rate_scale, config.weight_decay),
    }
    parameters: dict[str, list[nn.Parameter]] = {group: [] for group in settings}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and parameter not in own_scales:
            parameters[_group(name)].append(parameter)
    groups = [
        {"params": parameters[group], "scale": scale, "weight_decay": decay}
        for group, (scale, decay) in settings.items()
        if parameters[group]
    ]
    groups += [
        {"params": [expert], "scale": scale, "weight_decay": config.weight_decay}
        for expert, scale in own_scales.items()
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _group(name: str) -> str:
    """The group of a parameter; heads and projector stand beside the adapters in what is trained."""
    first = name.partition(".")[0]
    if first in ("heads", "projector"):
        return first
    return "routing" if name.endswith(("lora_route", "task_bias")) else "experts"


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then a cosine down to a fraction of the peak.

    After `steps` it stays there.
    """
    warmup = max(1, round(steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
