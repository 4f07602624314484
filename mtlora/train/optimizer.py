"""The optimizer and its schedule."""

import math

import torch
from torch import nn

from mtlora.train.config import TrainingConfig


def make_optimizer(trained: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW. Routers and task biases have a rate of their own and no decay; heads and projector have own rates."""
    routing: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    projector: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("heads."):
            heads.append(parameter)
        elif name.startswith("projector."):
            projector.append(parameter)
        else:
            (routing if name.endswith(("lora_route", "task_bias")) else experts).append(parameter)
    groups = [
        {"params": experts, "scale": 1.0, "weight_decay": config.weight_decay},
        {"params": routing, "scale": config.router_learning_rate_scale, "weight_decay": 0.0},
        {"params": projector, "scale": config.projector_learning_rate_scale, "weight_decay": config.weight_decay},
        {"params": heads, "scale": config.head_learning_rate_scale, "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fraction of the peak, where it stays after `steps`."""
    warmup = max(1, round(steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
