"""The frozen backbone as a Hugging Face model, with an adapter beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtlora.adapter import AdapterSet
from mtlora.backbone import BackboneIdentity, identify
from mtlora.checkpoint import Checkpoint
from mtlora.config import MtLoRAConfig


@dataclass
class AdaptedModel:
    """A backbone with its tokenizer and the adapter attached to it."""

    model: Any
    tokenizer: Any
    adapters: AdapterSet
    backbone: BackboneIdentity

    def answer_logits(self, tokens_BL: torch.Tensor, bias_index_B: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [A, vocabulary] at flat positions `rows` [A]: the vocabulary product runs where it is needed alone."""
        with self.adapters.context.use(bias_index_B):
            hidden_BLD = self.model.model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden_BLD.flatten(0, 1)[rows])


def load_backbone(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(frozen model in evaluation mode, tokenizer) of a backbone folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def new_adapted_model(folder: Path, config: MtLoRAConfig, num_tasks: int, dtype: torch.dtype) -> AdaptedModel:
    """A backbone with a fresh adapter: B and biases zero, A and routers from torch's generator."""
    model, tokenizer = load_backbone(folder, dtype)
    backbone = identify(folder)
    adapters = AdapterSet(config, backbone.hidden_size, backbone.num_layers, num_tasks)
    adapters.attach(model)
    return AdaptedModel(model, tokenizer, adapters, backbone)


def load_adapted_model(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> AdaptedModel:
    """A backbone with a checkpoint's adapter, in evaluation mode. The adapter computes in float32."""
    adapted = new_adapted_model(folder, checkpoint.manifest.config, len(checkpoint.manifest.tasks), dtype)
    adapted.adapters.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    adapted.adapters.eval()
    return adapted


def adapter_tensors(adapters: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their checkpoint names, rounded to `dtype`."""
    return {name: tensor.detach().to(dtype) for name, tensor in adapters.state_dict().items()}
