"""The frozen language backbone as a Hugging Face model, with an adapter beside it.

Shape suffixes: B sequences, L positions, S positions of documents, C = S + L, P tokens with a path, D hidden size,
A answer tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from mtlora.adapter import AdapterSet, Attachment
from mtlora.backbone import BackboneIdentity, check_language, identify
from mtlora.checkpoint.format import Checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.errors import BackboneError
from mtlora.methods import BaselineConfig, attach_baseline
from mtlora.prompt import PromptEncoder

if TYPE_CHECKING:
    from mtlora.model.soft_tokens import ImageReader


# Most characters of a message by transformers, which may list all its models.
_REASON_CHARS = 300


@dataclass(frozen=True)
class Documents:
    """The documents of a batch: each row continues one, which the backbone reads without the adapter.

    tokens_BS: int64, right-padded. positions_BL: int64, position ids of the rows' tokens after their document.
    mask_BLC: bool, whether a token attends to each token of its document and its row. path_P: see `TaskContext`.
    """

    tokens_BS: torch.Tensor
    positions_BL: torch.Tensor
    mask_BLC: torch.Tensor
    path_P: torch.Tensor | None


class Placed(NamedTuple):
    """An image in a prompt or batch: its first soft token's position (flat in a batch), and its key in the reader."""

    at: int
    key: str


@dataclass
class AdaptedModel:
    """A backbone with its tokenizer and an adapter or a baseline.

    reader: reads images for tasks that take text and an image.
    """

    model: Any
    tokenizer: Any
    adapters: Attachment
    backbone: BackboneIdentity
    reader: "ImageReader | None" = None

    @cached_property
    def prompts(self) -> PromptEncoder:
        """The encoder of prompts and answers into token ids."""
        return PromptEncoder(self.tokenizer)

    @property
    def activated(self) -> bool:
        """Whether the adapter is active only from the task's own part of a prompt on."""
        return isinstance(self.adapters, AdapterSet) and self.adapters.config.activation == "task"

    @torch.no_grad()
    def read(self, tokens_BS: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """Run documents through the backbone without adapter; returns keys and values as a transformers cache."""
        with self.adapters.context.backbone_alone():
            return self.model.model(input_ids=tokens_BS, use_cache=True, **inputs).past_key_values

    def inputs(self, tokens_BL: torch.Tensor, images: Sequence[Placed] = ()) -> dict[str, torch.Tensor]:
        """The model's inputs for tokens, with the images' soft tokens at their places; see `ImageReader.embedded`."""
        if not images:
            return {"input_ids": tokens_BL}
        assert self.reader is not None
        return {"inputs_embeds": self.reader.embedded(self.model.get_input_embeddings()(tokens_BL), images)}

    def answer_states(
        self,
        tokens_BL: torch.Tensor,
        bias_index: torch.Tensor,
        rows_A: torch.Tensor,
        documents: Documents | None = None,
        images: Sequence[Placed] = (),
    ) -> torch.Tensor:
        """Last hidden states [A, D] at flat positions `rows_A`, so that the vocabulary product runs only for these.

        bias_index: one for each sequence [B], or for each token [B, L]. The inputs may be on any device. With gradient
        checkpointing, the caller must keep the tasks set during the backward pass too.
        """
        device = self.model.device
        inputs: dict[str, Any] = {}
        path_P = None
        if documents is not None:
            inputs = {
                "past_key_values": self.read(documents.tokens_BS.to(device)),
                "position_ids": documents.positions_BL.to(device),
                "attention_mask": documents.mask_BLC.unsqueeze(1).to(device),
            }
            path_P = None if documents.path_P is None else documents.path_P.to(device)
        with self.adapters.context.use(bias_index.to(device), path_P):
            inputs |= self.inputs(tokens_BL.to(device), images)
            hidden_BLD = self.model.model(use_cache=False, **inputs).last_hidden_state
        states_AD: torch.Tensor = hidden_BLD.flatten(0, 1)[rows_A.to(device)]
        return states_AD

    def answer_logits(
        self,
        tokens_BL: torch.Tensor,
        bias_index: torch.Tensor,
        rows_A: torch.Tensor,
        documents: Documents | None = None,
        images: Sequence[Placed] = (),
    ) -> torch.Tensor:
        """Logits [A, V] of `answer_states`."""
        states_AD = self.answer_states(tokens_BL, bias_index, rows_A, documents, images)
        logits_AV: torch.Tensor = self.model.lm_head(states_AD)
        return logits_AV


def load_backbone(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(frozen model in evaluation mode, tokenizer) of a backbone folder. Raises BackboneError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    check_language(folder)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except MemoryError:
        raise
    # transformers raises errors of many kinds for wrong folders.
    except Exception as error:
        reason = " ".join(str(error).split())[:_REASON_CHARS]
        raise BackboneError(f"{folder}: no usable language backbone ({type(error).__name__}: {reason})") from error
    model.eval().requires_grad_(False)
    return model, tokenizer


def new_adapted_model(
    folder: Path, config: MtLoRAConfig | BaselineConfig, num_tasks: int, dtype: torch.dtype
) -> AdaptedModel:
    """A backbone with a new adapter or baseline: B and biases are zero, A and routers random by torch's generator."""
    backbone = identify(folder)
    model, tokenizer = load_backbone(folder, dtype)
    if not isinstance(config, MtLoRAConfig):
        return AdaptedModel(model, tokenizer, attach_baseline(config, model), backbone)
    adapters = AdapterSet(config, backbone.hidden_size, backbone.num_layers, num_tasks)
    adapters.attach(model)
    return AdaptedModel(model, tokenizer, adapters, backbone)


def load_adapted_model(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, vision: Path | None = None
) -> AdaptedModel:
    """A backbone with a checkpoint's adapter, in evaluation mode. The adapter computes in float32.

    vision: the folder of the vision backbone, for an adapter whose tasks take images.
    """
    adapted = new_adapted_model(folder, checkpoint.manifest.config, len(checkpoint.manifest.tasks), dtype)
    adapted.adapters.load_state_dict({name: tensor.float() for name, tensor in checkpoint.paths.items()})
    adapted.adapters.eval()
    if checkpoint.manifest.projector is not None and vision is not None:
        from mtlora.model.soft_tokens import load_reader

        adapted.reader = load_reader(vision, checkpoint)
    return adapted


def adapter_tensors(adapters: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their checkpoint names, rounded to `dtype`."""
    return {name: tensor.detach().to(dtype) for name, tensor in adapters.state_dict().items()}
