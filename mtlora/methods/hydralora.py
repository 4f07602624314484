"""HydraLoRA at component level: a routed low-rank path beside single linear layers.

Shape suffixes: B sequences, L positions, I input features, O output features, r rank, N experts, K = N*r.
"""

import math
from typing import Any

import torch
from torch import nn

from mtlora.adapter import Attachment, TaskContext
from mtlora.errors import MtLoRAError
from mtlora.methods.config import HydraLoRAConfig


class HydraLinear(nn.Module):
    """The path beside one linear layer: softmax(R x)-weighted experts over a shared A, times alpha / r.

    Parameters are float32: lora_A [r, I], lora_B [N, O, r], lora_route [N, I]. B starts at zero.
    """

    def __init__(self, config: HydraLoRAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(config.num_experts, out_features, config.r))
        self.lora_route = nn.Parameter(torch.empty(config.num_experts, in_features))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.mean_routing_GN: torch.Tensor | None = None
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.lora_route, a=math.sqrt(5))

    def forward(self, x_BLI: torch.Tensor) -> torch.Tensor:
        """The path's output [B, L, O], in x's dtype."""
        wide_BLI = x_BLI.to(self.lora_A.dtype)
        weights_BLN = torch.softmax(nn.functional.linear(wide_BLI, self.lora_route), dim=-1)
        h_BLr = nn.functional.linear(self.dropout(wide_BLI), self.lora_A) * self.config.scaling
        if self.training:
            self.mean_routing_GN = weights_BLN.mean(dim=(0, 1)).unsqueeze(0)
        if self.config.products == "fused":
            z_BLK = (weights_BLN.unsqueeze(-1) * h_BLr.unsqueeze(-2)).flatten(-2)
            delta_BLO = z_BLK @ self.lora_B.transpose(1, 2).flatten(0, 1)
        else:
            delta_BLO = torch.zeros((), dtype=wide_BLI.dtype, device=wide_BLI.device)
            for i, B_Or in enumerate(self.lora_B.unbind()):
                delta_BLO = delta_BLO + weights_BLN[..., i : i + 1] * nn.functional.linear(h_BLr, B_Or)
        return delta_BLO.to(x_BLI.dtype)


class HydraLoRA(Attachment):
    """A path beside every linear layer of the given names, by forward hooks."""

    def __init__(self, config: HydraLoRAConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.context = TaskContext()
        self.paths = nn.ModuleDict()
        for name, linear in linear_layers(model, config.target_modules).items():
            path = HydraLinear(config, linear.in_features, linear.out_features)
            self.paths[name.replace(".", "-")] = path
            linear.register_forward_hook(self._hook(path))

    def linears(self) -> list[HydraLinear]:
        """Every path, in the model's order."""
        return [path for path in self.paths.values() if isinstance(path, HydraLinear)]

    def mean_routing(self) -> list[torch.Tensor]:
        """See `Attachment`."""
        return [path.mean_routing_GN for path in self.linears() if path.mean_routing_GN is not None]

    def experts(self) -> list[torch.Tensor]:
        """See `Attachment`."""
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for path in self.linears():
            by_shape.setdefault(path.lora_B.shape, []).append(path.lora_B)
        return [torch.stack(matrices) for matrices in by_shape.values()]

    def _hook(self, path: nn.Module) -> Any:
        def add_path(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output + path(args[0]) if self.context.enabled else output

        return add_path


def linear_layers(model: Any, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The model's linear layers of these names, by path. Raises MtLoRAError for a name without a layer."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in names
    }
    missing = [name for name in names if not any(path.endswith(f".{name}") for path in found)]
    if missing:
        others = sorted({p.rsplit(".", 1)[-1] for p, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise MtLoRAError(
            f"target_modules: the backbone has no linear layer {', '.join(missing)}; it has {', '.join(others)}"
        )
    return found
