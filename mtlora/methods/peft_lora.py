"""A single LoRA for all tasks, made by PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mtlora.adapter import Attachment, TaskContext
from mtlora.methods.config import LoRAConfig
from mtlora.methods.hydralora import linear_layers

_NAME = "default"


class _PeftContext(TaskContext):
    """Disables PEFT's layers through PEFT's own interface; the task makes no difference here."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self._layers = layers

    @contextmanager
    def backbone_alone(self) -> Iterator[None]:
        with super().backbone_alone():
            try:
                for layer in self._layers:
                    layer.enable_adapters(False)
                yield
            finally:
                for layer in self._layers:
                    layer.enable_adapters(True)


class PeftLoRA(Attachment):
    """The modules that PEFT adds to the model: A and B in float32, and dropout."""

    def __init__(self, config: LoRAConfig, model: Any) -> None:
        super().__init__()
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        linear_layers(model, config.target_modules)
        inject_adapter_in_model(
            PeftConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(config.target_modules),
                bias="none",
            ),
            model,
            adapter_name=_NAME,
        )
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self.config = config
        self.paths = nn.ModuleDict(
            {
                name.replace(".", "-"): nn.ModuleDict(
                    {
                        "lora_A": layer.lora_A[_NAME].to(torch.float32),
                        "lora_B": layer.lora_B[_NAME].to(torch.float32),
                        "dropout": layer.lora_dropout[_NAME],
                    }
                )
                for name, layer in layers.items()
            }
        )
        self.requires_grad_(True)
        self.context = _PeftContext(list(layers.values()))
