"""`BlockAdapter`, the trainable path beside one block, and its attachment to a Hugging Face model.

Shape suffixes: B sequences, L positions, T = B*L tokens, P tokens with a path (all T, or some of them), D hidden size,
r rank, N experts, G groups, J = G*N.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mtlora.config import MtLoRAConfig
from mtlora.families import decoder_layers
from mtlora.ops.packed_block import route
from mtlora.ops.training import path_with_gradients


class TaskContext:
    """Which task each token of the running batch belongs to, and which tokens have a path; shared by a model's blocks.

    bias_index: int64, a row of the task biases for each sequence [B] or each token [B, L]; None outside `use`.
    path_P: int64, flat positions b*L + l of the tokens that get the path's output; None means all.
    """

    def __init__(self) -> None:
        self.bias_index: torch.Tensor | None = None
        self.path_P: torch.Tensor | None = None
        self.enabled = True

    @contextmanager
    def use(self, bias_index: torch.Tensor | None, path_P: torch.Tensor | None = None) -> Iterator[None]:
        """Set the tasks for passes in this block: forward and, with gradient checkpointing, backward."""
        previous = self.bias_index, self.path_P
        self.bias_index, self.path_P = bias_index, path_P
        try:
            yield
        finally:
            self.bias_index, self.path_P = previous

    @contextmanager
    def backbone_alone(self) -> Iterator[None]:
        """Disable every path in this block: the model is then the backbone alone."""
        previous, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = previous


class BlockAdapter(nn.Module):
    """The routed low-rank path beside one transformer block (arXiv 2603.01526, section 3).

    Parameters are float32: lora_A [r, D], lora_B [N, D, r], lora_route [G*N, D] (group-major) and, with task biases,
    task_bias [tasks, G, N]. B and the biases start at zero, so a new adapter leaves the backbone as it is.
    """

    def __init__(self, config: MtLoRAConfig, hidden_size: int, num_tasks: int, context: TaskContext) -> None:
        super().__init__()
        config.check_hidden_size(hidden_size)
        self.config = config
        self.context = context
        self.lora_A = nn.Parameter(torch.empty(config.r, hidden_size))
        self.lora_B = nn.Parameter(torch.zeros(config.num_experts, hidden_size, config.r))
        self.lora_route = nn.Parameter(torch.empty(config.router_rows, hidden_size))
        if config.task_bias:
            self.task_bias = nn.Parameter(torch.zeros(num_tasks, config.num_groups, config.num_experts))
        self.dropout = nn.Dropout(config.lora_dropout)
        # Mean routing weights [G, N] of the last training forward, for the balance loss.
        self.mean_routing_GN: torch.Tensor | None = None
        # Initialise A as PEFT does.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.lora_route, a=math.sqrt(5))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """The path's output, shape and dtype of `x_BLD`; the products run in the parameters' dtype.

        The output is zero for tokens without a path; routing statistics leave these tokens out.
        """
        config, (B, L, D), path_P = self.config, x_BLD.shape, self.context.path_P
        x_TD = self._with_path(x_BLD.reshape(B * L, D))
        delta_TD, weights_TGN = path_with_gradients(
            x_TD,
            self.lora_A,
            self.lora_B,
            self.lora_route,
            self._bias_TGN(B, L),
            num_groups=config.num_groups,
            scaling=config.scaling,
            dropped_TD=self.dropout(x_TD) if self.training and config.lora_dropout > 0 else None,
        )
        if self.training:
            self.mean_routing_GN = weights_TGN.mean(dim=0)
        if path_P is not None:
            delta_TD = delta_TD.new_zeros(B * L, D).index_copy(0, path_P, delta_TD)
        return delta_TD.view(B, L, D)

    @torch.no_grad()
    def routing(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Return the routing weights [T, G, N] that `forward` mixes experts with, float32, for T tokens with a path."""
        (B, L, _), G = x_BLD.shape, self.config.num_groups
        x_TD = self._with_path(x_BLD.flatten(0, 1))
        logits_TJ = nn.functional.linear(x_TD.to(self.lora_route.dtype), self.lora_route)
        return route(logits_TJ.view(len(x_TD), G, -1), self._bias_TGN(B, L))

    def _with_path(self, rows: torch.Tensor) -> torch.Tensor:
        """Select the tokens that have a path; `rows` has one row per token."""
        return rows if self.context.path_P is None else rows.index_select(0, self.context.path_P)

    def _bias_TGN(self, B: int, L: int) -> torch.Tensor | None:
        index = self.context.bias_index
        if not self.config.task_bias or index is None:
            return None
        if index.dim() == 2:
            return self.task_bias[self._with_path(index.flatten())]
        bias_BGN = self.task_bias[index]
        return self._with_path(bias_BGN.unsqueeze(1).expand(B, L, -1, -1).reshape(B * L, *bias_BGN.shape[1:]))


class Attachment(nn.Module):
    """The trained modules beside a frozen backbone. Its parameters and state do not include the backbone's."""

    context: TaskContext

    def mean_routing(self) -> list[torch.Tensor]:
        """Mean routing weights [G, N] of every router in the last training forward pass. Empty without routers."""
        return []

    def experts(self) -> list[torch.Tensor]:
        """The experts as stacks [M, N, D, r] of M matrices of one shape. Empty for a method without experts."""
        return []


class Nothing(Attachment):
    """The backbone stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.context = TaskContext()


class AdapterSet(Attachment):
    """All block adapters of one model, keyed as in a checkpoint: `layers.{l}.{module}`."""

    def __init__(self, config: MtLoRAConfig, hidden_size: int, num_layers: int, num_tasks: int) -> None:
        super().__init__()
        self.config = config
        self.context = TaskContext()
        self.layers = nn.ModuleList(
            nn.ModuleDict({m: BlockAdapter(config, hidden_size, num_tasks, self.context) for m in config.modules})
            for _ in range(num_layers)
        )

    def blocks(self) -> Iterator[BlockAdapter]:
        """Every block adapter, layer by layer."""
        return (module for module in self.modules() if isinstance(module, BlockAdapter))

    def mean_routing(self) -> list[torch.Tensor]:
        """See `Attachment`."""
        found = [block.mean_routing_GN for block in self.blocks() if block.mean_routing_GN is not None]
        return found if self.config.num_experts > 1 else []

    def experts(self) -> list[torch.Tensor]:
        """See `Attachment`."""
        trained: list[torch.Tensor] = [block.lora_B for block in self.blocks() if block.lora_B.requires_grad]
        return [torch.stack(trained)] if trained else []

    def attach(self, model: nn.Module) -> list[Any]:
        """Add every path to its block's output by forward hooks; returns their handles (call `.remove()` to detach).

        `model`: a transformers model of the layout in `mtlora.families`. Raises ValueError, and attaches nothing, if
        its number of layers differs.
        """
        layers = decoder_layers(model)
        if len(layers) != len(self.layers):
            raise ValueError(f"the adapter has {len(self.layers)} layers, the model {len(layers)}")
        handles = []
        for adapters, decoder_layer in zip(self.layers, layers, strict=True):
            assert isinstance(adapters, nn.ModuleDict)
            for name, adapter in adapters.items():
                block = decoder_layer.get_submodule(name)
                handles.append(block.register_forward_hook(self._hook(adapter), with_kwargs=True))
        return handles

    def _hook(self, adapter: nn.Module) -> Any:
        def add_path(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self.context.enabled:
                return output
            delta = adapter(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        return add_path
