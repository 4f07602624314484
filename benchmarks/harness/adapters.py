"""Random adapters for measurements and tests."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import (
    MANIFEST_FILE,
    TENSORS_FILE,
    AdapterManifest,
    ProjectorConfig,
    TaskEntry,
    format_version,
)
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.vision.image_input import ImageInput

# Name, id and path of a `LoRARequest`.
Slot = tuple[str, int, str]
CONFIG = MtLoRAConfig(r=16, num_experts=8, num_groups=4)
PEFT_RANK = 16
_SCALE = 0.02


def random_tasks(number: int, *, max_new_tokens: int = 32) -> tuple[TaskEntry, ...]:
    """Tasks `task-0`, `task-1`, ... whose prompt is the input."""
    return tuple(
        TaskEntry(id=f"task-{i}", description="random", template="{input}", bias_index=i, max_new_tokens=max_new_tokens)
        for i in range(number)
    )


def random_image_tasks(number: int, *, size: int) -> tuple[TaskEntry, ...]:
    """Tasks `task-0`, `task-1`, ... of images, with ten classes each."""
    labels, image = tuple(f"class {i}" for i in range(10)), ImageInput(size=size)
    return tuple(
        TaskEntry(id=f"task-{i}", description="random", allowed_answers=labels, image=image, bias_index=i)
        for i in range(number)
    )


def random_tensors(
    backbone: BackboneIdentity,
    config: MtLoRAConfig,
    tasks: Sequence[TaskEntry],
    *,
    seed: int = 0,
    scale: float | Mapping[str, float] = 1.0,
    projector: ProjectorConfig | None = None,
    frozen: Iterable[int] = (),
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, normally distributed, in float32.

    scale: the standard deviation of all, or by the last part of a tensor's name. frozen: layers whose experts are zero.
    """
    version = format_version(config, tasks)
    manifest = AdapterManifest(
        format_version=version,
        backbone=backbone,
        config=config,
        tasks=tuple(tasks),
        projector=projector,
        tensors_sha256="0" * 64,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator)
        * (scale if isinstance(scale, float) else scale[name.rpartition(".")[2]])
        for name, shape in manifest.tensor_shapes().items()
    }
    for layer in frozen:
        for module in config.modules:
            tensors[f"layers.{layer}.{module}.lora_B"].zero_()
    return tensors


def write_random_adapter(
    folder: Path,
    backbone: BackboneIdentity,
    tasks: Sequence[TaskEntry],
    *,
    seed: int = 0,
    config: MtLoRAConfig = CONFIG,
    frozen: Iterable[int] = (),
) -> AdapterManifest:
    """Write a checkpoint of the shipped adapter's size in float16. frozen: as in `random_tensors`."""
    tensors = random_tensors(backbone, config, tasks, seed=seed, scale=_SCALE, frozen=frozen)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    return write_checkpoint(folder, backbone=backbone, config=config, tasks=tuple(tasks), tensors=halves)


def link_adapter(source: Path, folder: Path) -> None:
    """Write another adapter as hard links: its weights take memory of their own in the engine, but no disk."""
    folder.mkdir(parents=True)
    for name in (MANIFEST_FILE, TENSORS_FILE):
        os.link(source / name, folder / name)


def task_slots(folder: Path, number: int, ids: Iterator[int]) -> list[Slot]:
    """The slots of the tasks `task-0`, `task-1`, ... of an adapter."""
    return [(f"{folder.name}#task-{i}", next(ids), f"{folder}#task-{i}") for i in range(number)]


def write_random_pefts(folder: Path, number: int, config: Mapping[str, int]) -> list[Slot]:
    """`write_random_peft` for `peft-0`, `peft-1`, ...; returns their slots."""
    for i in range(number):
        write_random_peft(folder / f"peft-{i}", config, seed=i)
    return [(f"peft-{i}", i + 1, str(folder / f"peft-{i}")) for i in range(number)]


def write_random_peft(folder: Path, config: Mapping[str, int], *, seed: int) -> None:
    """Write a PEFT LoRA, rank 16, on the seven linear layers of every block; `config` is the backbone's config.json."""
    generator = torch.Generator().manual_seed(seed)
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
            tensors[f"{prefix}.lora_A.weight"] = _SCALE * torch.randn(PEFT_RANK, inputs, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = _SCALE * torch.randn(outputs, PEFT_RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    modules = sorted(name.split(".")[1] for name in sizes)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": PEFT_RANK, "lora_alpha": PEFT_RANK, "target_modules": modules,
                    "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0})
    )  # fmt: skip
