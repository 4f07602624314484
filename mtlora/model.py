"""The frozen backbone as a Hugging Face model, with an adapter beside it.

Shape suffixes: B sequences, L positions, D hidden size, A answer tokens, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtlora.adapter import AdapterSet, Attachment
from mtlora.backbone import BackboneIdentity, identify
from mtlora.checkpoint.format import Checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.methods import BaselineConfig, attach_baseline
from mtlora.prompt import PromptEncoder


@dataclass
class AdaptedModel:
    """A backbone with its tokenizer and what is attached to it."""

    model: Any
    tokenizer: Any
    adapters: Attachment
    backbone: BackboneIdentity

    @cached_property
    def prompts(self) -> PromptEncoder:
        """Makes token ids of prompts and answers."""
        return PromptEncoder(self.tokenizer)

    def answer_states(self, tokens_BL: torch.Tensor, bias_index_B: torch.Tensor, rows_A: torch.Tensor) -> torch.Tensor:
        """Last hidden states [A, D] at flat positions `rows_A`: the vocabulary product runs for these alone.

        The inputs may be on any device. With gradient checkpointing, the caller must keep the tasks in use for the
        backward pass too.
        """
        device = self.model.device
        with self.adapters.context.use(bias_index_B.to(device)):
            hidden_BLD = self.model.model(input_ids=tokens_BL.to(device), use_cache=False).last_hidden_state
        states_AD: torch.Tensor = hidden_BLD.flatten(0, 1)[rows_A.to(device)]
        return states_AD

    def answer_logits(self, tokens_BL: torch.Tensor, bias_index_B: torch.Tensor, rows_A: torch.Tensor) -> torch.Tensor:
        """Logits [A, vocabulary] of `answer_states`."""
        logits_AV: torch.Tensor = self.model.lm_head(self.answer_states(tokens_BL, bias_index_B, rows_A))
        return logits_AV


def load_backbone(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(frozen model in evaluation mode, tokenizer) of a backbone folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def new_adapted_model(
    folder: Path, config: MtLoRAConfig | BaselineConfig, num_tasks: int, dtype: torch.dtype
) -> AdaptedModel:
    """A backbone with a fresh adapter or baseline: B and biases are zero, A and routers come from torch's generator."""
    model, tokenizer = load_backbone(folder, dtype)
    if not isinstance(config, MtLoRAConfig):
        return AdaptedModel(model, tokenizer, attach_baseline(config, model), identify(folder))
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
