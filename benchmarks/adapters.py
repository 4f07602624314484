"""Random adapters to benchmark with: every path is full work, and none is the shipped one's."""

import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, AdapterManifest, TaskEntry, write_checkpoint
from mtlora.config import MtLoRAConfig

CONFIG = MtLoRAConfig(r=16, num_experts=8, num_groups=4)
PEFT_RANK = 16


def write_random_adapter(
    folder: Path, backbone: BackboneIdentity, *, num_tasks: int, seed: int, max_new_tokens: int = 32
) -> AdapterManifest:
    """Write an mtLoRA checkpoint of random float16 tensors with `num_tasks` tasks `task-0`, `task-1`, ..."""
    generator = torch.Generator().manual_seed(seed)
    tasks = tuple(
        TaskEntry(id=f"task-{i}", description="random", template="{input}", bias_index=i, max_new_tokens=max_new_tokens)
        for i in range(num_tasks)
    )
    shapes = _shapes(backbone, tasks)
    tensors = {name: (0.02 * torch.randn(shape, generator=generator)).half() for name, shape in shapes.items()}
    return write_checkpoint(folder, backbone=backbone, config=CONFIG, tasks=tasks, tensors=tensors)


def _shapes(backbone: BackboneIdentity, tasks: tuple[TaskEntry, ...]) -> dict[str, tuple[int, ...]]:
    manifest = AdapterManifest(backbone=backbone, config=CONFIG, tasks=tasks, tensors_sha256="0" * 64)
    return manifest.tensor_shapes()


def link_adapter(source: Path, folder: Path) -> None:
    """Another adapter of the same bytes: a folder of its own, so a store of its own weights, and no more disk."""
    folder.mkdir(parents=True)
    for name in (MANIFEST_FILE, TENSORS_FILE):
        os.link(source / name, folder / name)


def write_random_peft(folder: Path, config: dict[str, int], *, seed: int) -> None:
    """Write a PEFT LoRA, rank 16, on the seven linear layers of every block; `config` is the backbone's config.json."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes = {
        "self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden), "mlp.gate_proj": (hidden, middle), "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }  # fmt: skip
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (inputs, outputs) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.02 * torch.randn(PEFT_RANK, inputs, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.02 * torch.randn(outputs, PEFT_RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    modules = sorted(name.split(".")[1] for name in sizes)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": PEFT_RANK, "lora_alpha": PEFT_RANK, "target_modules": modules,
                    "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0})
    )  # fmt: skip
