"""A transformer block with the routed path beside it, and the operator that adds the path.

Shape suffixes: T rows of the batch (tokens and padding), D hidden size.
"""

import inspect
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.utils.torch_utils import direct_register_custom_op

from mtlora.vllm_plugin.step import StepMapping

OPERATOR = "mtlora::add_layer_path_"
# Kept for the process's life: an operator ends with its library.
_LIBRARY = torch.library.Library("mtlora", "FRAGMENT")


class RoutedBlock(BaseLayerWithLoRA):
    """Wraps a decoder layer's `mlp` or `self_attn`: y = F(x) + path(x).

    index: the block's number among the model's wrapped blocks.
    name: its name in a checkpoint, `layers.{l}.{module}`.
    layer_name: its key in vLLM's forward context. It is the same in every start, because compiled graphs stay on disk.
    """

    def __init__(self, base_layer: nn.Module, index: int, name: str, layer_name: str, step: StepMapping) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Called without the module's own call: a small model's layer takes tens of microseconds.
        self._base_forward = base_layer.forward
        self.index = index
        self.block_name = name
        self.layer_name = layer_name
        self.step = step
        parameters = list(inspect.signature(base_layer.forward).parameters)
        # Attention modules name their input `hidden_states`, most MLPs `x`.
        inputs = [p for p in parameters if p in ("hidden_states", "x")]
        if not inputs:
            raise ValueError(f"{layer_name}: {type(base_layer).__name__}.forward takes neither hidden_states nor x")
        self.input_name, self.input_index = inputs[0], parameters.index(inputs[0])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The block's output [T, D] with the path added to it in place."""
        x_TD = kwargs[self.input_name] if self.input_name in kwargs else args[self.input_index]
        if torch.compiler.is_compiling():
            y_TD: torch.Tensor = self.base_layer(*args, **kwargs)
            torch.ops.mtlora.add_layer_path_(y_TD, x_TD, self.layer_name)
        else:  # without a compiler, the operator's dispatch costs as much as a small layer's path
            y_TD = self._base_forward(*args, **kwargs)
            self.add_path_(y_TD, x_TD)
        return y_TD

    def add_path_(self, y_TD: torch.Tensor, x_TD: torch.Tensor) -> None:
        """Add to `y_TD`, in place, the path of every row that has an adapter in this step."""
        if self.step.num_tokens > len(x_TD):
            raise RuntimeError(f"{self.layer_name}: {len(x_TD)} rows in a step of {self.step.num_tokens} tokens")
        self.step.add_path_(y_TD, x_TD, self.index)


def _add_layer_path_(y: torch.Tensor, x: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].add_path_(y, x)


def _add_layer_path_fake(y: torch.Tensor, x: torch.Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    op_name="add_layer_path_",
    op_func=_add_layer_path_,
    mutates_args=["y"],
    fake_impl=_add_layer_path_fake,
    target_lib=_LIBRARY,
)
