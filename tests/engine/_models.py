"""Tiny random backbones and random adapters for the engine's tests, and Hugging Face's answer to each.

Shape suffixes: L positions of a prompt, V vocabulary, T tokens, D hidden size, G groups, N experts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness.adapters import random_tensors
from mtlora.adapter import AdapterSet
from mtlora.backbone import BackboneIdentity, identify
from mtlora.checkpoint.format import AdapterManifest, Checkpoint, TaskEntry
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.ops.reference import routed_lora_reference

VOCABULARY = 96
HIDDEN_SIZE = 64


def make_model(folder: Path, family: str, *, num_layers: int = 2, hidden_size: int = HIDDEN_SIZE) -> Path:
    """Write a random model of a family with large weights, so that every block affects the logits."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    backbone: BackboneIdentity,
    config: MtLoRAConfig,
    *,
    num_tasks: int = 2,
    seed: int = 0,
    size: float = 1.0,
    frozen: Iterable[int] = (),
    **fields: Any,
) -> AdapterManifest:
    """Write a random adapter with tasks t0, t1, ...; `size` is about that of its output for inputs of size one.

    frozen: layers whose experts are zero. fields: of every task.
    """
    tasks = tuple(
        TaskEntry(id=f"t{i}", description="a test's task", bias_index=i if config.task_bias else None, **fields)
        for i in range(num_tasks)
    )
    d, N = backbone.hidden_size, config.num_experts
    scale = {
        "lora_A": d**-0.5,
        "lora_B": size * (N / config.r) ** 0.5 / config.scaling,
        "lora_route": d**-0.5,
        "task_bias": 2.0,
        "weight": 1.0,
        "bias": 1.0,
    }
    tensors = random_tensors(backbone, config, tasks, seed=seed, scale=scale, frozen=frozen)
    return write_checkpoint(folder, backbone=backbone, config=config, tasks=tasks, tensors=tensors)


def path_reference(checkpoint: Checkpoint, task_id: str | None, name: str, x_TD: torch.Tensor) -> torch.Tensor | None:
    """The formula's path of one block [T, D] in float64; None where the adapter leaves this block alone.

    Weights are rounded to the engine's dtype first, the scaled experts after scaling, as the engine holds them.
    """
    config, tensors, dtype = checkpoint.manifest.config, checkpoint.tensors, x_TD.dtype
    if f"{name}.lora_A" not in tensors:
        return None
    bias_TGN = None
    if config.task_bias and task_id is not None:
        row = checkpoint.manifest.task(task_id).bias_index
        bias_TGN = tensors[f"{name}.task_bias"][row].expand(len(x_TD), -1, -1)
    return routed_lora_reference(
        x_TD,
        tensors[f"{name}.lora_A"].to(dtype),
        (tensors[f"{name}.lora_B"] * config.scaling).to(dtype),
        tensors[f"{name}.lora_route"].to(dtype),
        bias_TGN,
        num_groups=config.num_groups,
        scaling=1.0,
    )


def all_logprobs(positions: Iterable[Any]) -> torch.Tensor:
    """vLLM's log-probabilities [L, V] of the whole vocabulary at these positions."""
    return torch.tensor([[each[token].logprob for token in range(VOCABULARY)] for each in positions])


class HuggingFace:
    """The same backbone in transformers, in float32, with an adapter attached by hooks."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.backbone = identify(folder)

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int], adapter: Path | None = None, task_id: str | None = None) -> torch.Tensor:
        """Log-probabilities [L, V] of the token after each position."""
        handles: list[Any] = []
        context = None
        if adapter is not None:
            checkpoint = read_checkpoint(adapter)
            manifest = checkpoint.manifest
            paths = AdapterSet(
                manifest.config, self.backbone.hidden_size, self.backbone.num_layers, len(manifest.tasks)
            ).eval()
            paths.load_state_dict(checkpoint.tensors)
            handles = paths.attach(self.model)
            if task_id is not None and manifest.config.task_bias:
                context = paths.context
                context.bias_index = torch.tensor([manifest.task(task_id).bias_index])
        try:
            logits_LV = self.model(torch.tensor([token_ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits_LV.float().log_softmax(-1)
