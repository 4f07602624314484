"""A transformer block with the routed path beside it, and the one operator that adds the path.

Shape suffixes: T rows of the batch (tokens and padding), D hidden size, G groups, N experts.
"""

import inspect
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.utils.torch_utils import direct_register_custom_op

from mtlora.ops.routed_lora import routed_lora
from mtlora.vllm_plugin.step import StepMapping

OPERATOR = "mtlora::routed_lora_"
# Lives as long as the process: the operator goes with its library.
_LIBRARY = torch.library.Library("mtlora", "FRAGMENT")


class RoutedBlock(BaseLayerWithLoRA):
    """Wraps a decoder layer's `mlp` or `self_attn`: y = F(x) + path(x).

    name: the block's name in a checkpoint, `layers.{l}.{module}`.
    layer_name: what the operator finds it by in vLLM's forward context; the same in every start, as compiled graphs
    are kept on disk.
    """

    def __init__(self, base_layer: nn.Module, name: str, layer_name: str, step: StepMapping) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block_name = name
        self.layer_name = layer_name
        self.step = step
        parameters = list(inspect.signature(base_layer.forward).parameters)
        # Llama-style blocks call their input `hidden_states`; most MLPs call it `x`.
        inputs = [p for p in parameters if p in ("hidden_states", "x")]
        if not inputs:
            raise ValueError(f"{layer_name}: {type(base_layer).__name__}.forward takes neither hidden_states nor x")
        self.input_name, self.input_index = inputs[0], parameters.index(inputs[0])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The block's output [T, D] with the path added to it in place."""
        x_TD = kwargs[self.input_name] if self.input_name in kwargs else args[self.input_index]
        y_TD = self.base_layer(*args, **kwargs)
        torch.ops.mtlora.routed_lora_(y_TD, x_TD, self.layer_name)
        return y_TD

    def add_path_(self, y_TD: torch.Tensor, x_TD: torch.Tensor) -> None:
        """Add to `y_TD`, in place, the path of every row that the step gives to an adapter."""
        step = self.step
        if step.num_tokens > len(x_TD):
            raise RuntimeError(f"{self.layer_name}: {len(x_TD)} rows in a step of {step.num_tokens} tokens")
        for share in step.shares:
            block = share.adapter.blocks.get(self.block_name)
            if block is None:
                continue
            table = share.adapter.bias.get(self.block_name)
            bias_TGN = None if table is None else table[share.bias_rows]
            if isinstance(share.rows, slice):
                y_TD[share.rows].add_(routed_lora(x_TD[share.rows], block, bias_TGN))
            else:
                y_TD.index_add_(0, share.rows, routed_lora(x_TD[share.rows], block, bias_TGN))


def _routed_lora_(y: torch.Tensor, x: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].add_path_(y, x)


def _routed_lora_fake(y: torch.Tensor, x: torch.Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(
    op_name="routed_lora_",
    op_func=_routed_lora_,
    mutates_args=["y"],
    fake_impl=_routed_lora_fake,
    target_lib=_LIBRARY,
)
