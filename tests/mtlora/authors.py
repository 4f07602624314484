"""The block adapter as the paper's authors describe it: a loop over experts, with a tensor [tokens, d] for each.

Written from the description of their layout and forward pass, to compare conversions with. Names are those of their
state dict.
"""

from typing import Any

import torch
from torch import nn


class AuthorsBlockAdapter(nn.Module):
    """A path beside a block: shared A, one B per expert, a linear router without bias; no router with one expert."""

    def __init__(self, dim: int, rank: int, num_experts: int, *, lora_alpha: float, num_groups: int = 1) -> None:
        super().__init__()
        self.num_experts, self.num_groups, self.scaling = num_experts, num_groups, lora_alpha / rank
        self.lora_A = nn.Linear(dim, rank, bias=False)
        self.lora_B = nn.ModuleList(nn.Linear(rank, dim, bias=False) for _ in range(num_experts))
        self.lora_route = nn.Linear(dim, num_groups * num_experts, bias=False) if num_experts > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.lora_A(x)
        if self.lora_route is None:
            return self.lora_B[0](hidden) * self.scaling
        logits = self.lora_route(x).view(*x.shape[:-1], self.num_groups, self.num_experts)
        weight = torch.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
        group_size = x.shape[-1] // self.num_groups
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.lora_B):
            result = result + weight[..., i].repeat_interleave(group_size, dim=-1) * expert(hidden) * self.scaling
        return result


def authors_state(adapters: dict[tuple[int, str], nn.Module], prefix: str) -> dict[str, torch.Tensor]:
    """A state dict in their layout, of the adapters at (layer, module)."""
    return {
        f"{prefix}layers.{layer}.{module}.block_adapter.{name}": tensor.detach().clone()
        for (layer, module), adapter in adapters.items()
        for name, tensor in adapter.state_dict().items()
    }


def attach_authors(model: nn.Module, adapters: dict[tuple[int, str], nn.Module]) -> list[Any]:
    """Add every adapter to its block's output; returns the hooks' handles."""
    handles = []
    for (layer, module), adapter in adapters.items():

        def add(_module: nn.Module, args: Any, kwargs: Any, output: Any, adapter: nn.Module = adapter) -> Any:
            path = adapter(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            return (output[0] + path, *output[1:]) if isinstance(output, tuple) else output + path

        block = model.get_submodule(f"model.layers.{layer}.{module}")
        handles.append(block.register_forward_hook(add, with_kwargs=True))
    return handles
