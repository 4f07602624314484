"""A transformer block with the routed path beside it, and the two operators of the path: before the block, and after.

Compilers see opaque operators that change `scratch` and y in place; vLLM's graphs are captured with what they launch.
A layer's name is an argument of the graph, so that all layers share one.

Shape suffixes: T rows of the batch (tokens and padding), D hidden size.
"""

import inspect
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from mtlora.vllm_plugin.step import StepMapping

# Keep the library for the life of the process, because its operators end with it.
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
        # Call `forward` directly: `__call__` costs time, and a small model's layer takes only tens of microseconds.
        self._base_forward = base_layer.forward
        self.index = index
        self.block_name = name
        self.layer_name = layer_name
        self.step = step
        # An attention block may be cut into several graphs, and a second stream must join in the graph that it left.
        self.beside = name.rpartition(".")[2] == "mlp"
        parameters = list(inspect.signature(base_layer.forward).parameters)
        # Attention modules name their input `hidden_states`, most MLPs `x`.
        inputs = [p for p in parameters if p in ("hidden_states", "x")]
        if not inputs:
            raise ValueError(f"{layer_name}: {type(base_layer).__name__}.forward takes neither hidden_states nor x")
        self.input_name, self.input_index = inputs[0], parameters.index(inputs[0])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The block's output [T, D] with the path added to it in place."""
        x_TD = kwargs[self.input_name] if self.input_name in kwargs else args[self.input_index]
        step = self.step
        if torch.compiler.is_compiling():
            name = _encode_layer_name(self.layer_name)
            if step.begins:
                torch.ops.mtlora.begin_path(x_TD, step.scratch, name)
            y_TD: torch.Tensor = self.base_layer(*args, **kwargs)
            torch.ops.mtlora.finish_path_(y_TD, x_TD, step.scratch, name)
        else:  # without a compiler, an operator's dispatch costs as much as a small layer's path
            if step.begins:
                self.begin(x_TD)
            y_TD = self._base_forward(*args, **kwargs)
            self.finish_(y_TD, x_TD)
        return y_TD

    def begin(self, x_TD: torch.Tensor) -> None:
        """Compute the part of the path that needs only the block's input; it may run beside the block."""
        self.step.begin(x_TD, self.index, beside=self.beside)

    def finish_(self, y_TD: torch.Tensor, x_TD: torch.Tensor) -> None:
        """Add to `y_TD`, in place, the path of every row that has an adapter in this step."""
        self.step.finish_(y_TD, x_TD, self.index)


def _block(layer_name: LayerNameType) -> RoutedBlock:
    block: RoutedBlock = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return block


def _begin_path(x: torch.Tensor, scratch: torch.Tensor, layer_name: LayerNameType) -> None:
    _block(layer_name).begin(x)


def _begin_path_fake(x: torch.Tensor, scratch: torch.Tensor, layer_name: LayerNameType) -> None:
    return None


def _finish_path_(y: torch.Tensor, x: torch.Tensor, scratch: torch.Tensor, layer_name: LayerNameType) -> None:
    _block(layer_name).finish_(y, x)


def _finish_path_fake(y: torch.Tensor, x: torch.Tensor, scratch: torch.Tensor, layer_name: LayerNameType) -> None:
    return None


for _name, _function, _changed, _fake in (
    ("begin_path", _begin_path, "scratch", _begin_path_fake),
    ("finish_path_", _finish_path_, "y", _finish_path_fake),
):
    direct_register_custom_op(
        op_name=_name, op_func=_function, mutates_args=[_changed], fake_impl=_fake, target_lib=_LIBRARY
    )
