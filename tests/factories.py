"""Small random checkpoints, and ways to damage them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import adapters
from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, AdapterManifest, ProjectorConfig, TaskEntry
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.train.start import StartingPoint
from mtlora.vision.image_input import ImageInput, ImagePreparation, Pooling

if TYPE_CHECKING:
    from mtlora.model.language import AdaptedModel

IDENTITY = BackboneIdentity(architecture="LlamaForCausalLM", hidden_size=8, num_layers=2, weights_fingerprint="ab" * 32)
CONFIG = MtLoRAConfig(r=2, lora_alpha=4, num_experts=3, num_groups=2)


def task_table(num_tasks: int, *, biased: bool = True, document_template: str | None = None) -> tuple[TaskEntry, ...]:
    """`num_tasks` tasks; bias indices are in reverse order, so that a mistaken index is noticed."""
    return tuple(
        TaskEntry(
            id=f"task-{i}",
            description=f"Task {i}.",
            document_template=document_template,
            bias_index=num_tasks - 1 - i if biased else None,
        )
        for i in range(num_tasks)
    )


def image_table(num_tasks: int = 3, *, biased: bool = True, pooling: Pooling = "cls_mean") -> tuple[TaskEntry, ...]:
    """Like `task_table`, but the tasks take images and have 2, 3, ... classes."""
    return tuple(
        entry.model_copy(
            update={
                "allowed_answers": tuple(f"class {name}" for name in range(i + 2)),
                "image": ImageInput(size=56, pooling=pooling),
            }
        )
        for i, entry in enumerate(task_table(num_tasks, biased=biased))
    )


def image_tensors(tasks: tuple[TaskEntry, ...], config: MtLoRAConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint with these tasks of images."""
    return adapters.random_tensors(IDENTITY, config, tasks)


def write_random_images(folder: Path, **kwargs: Any) -> AdapterManifest:
    """Write a checkpoint of three tasks of images; `kwargs` as for `write_random`."""
    tasks = image_table(3)
    return write_random(folder, **({"tasks": tasks, "tensors": image_tensors(tasks)} | kwargs))


VISION_IDENTITY = BackboneIdentity(
    architecture="Dinov2Model", hidden_size=6, num_layers=2, weights_fingerprint="cd" * 32
)
PROJECTOR = ProjectorConfig(backbone=VISION_IDENTITY, merge=2)


def picture_table() -> tuple[TaskEntry, ...]:
    """Like `task_table`, but all tasks but the first take text and an image."""
    changed = {"template": "{image}{input}", "picture": ImagePreparation(size=56)}
    return tuple(task.model_copy(update=changed if i else {}) for i, task in enumerate(task_table(3)))


def picture_tensors() -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint with these tasks."""
    return adapters.random_tensors(IDENTITY, CONFIG, picture_table(), projector=PROJECTOR)


def write_random_pictures(folder: Path) -> AdapterManifest:
    """Write a checkpoint of text tasks of which two take an image."""
    return write_random(folder, tasks=picture_table(), tensors=picture_tensors(), projector=PROJECTOR)


def random_tensors(
    config: MtLoRAConfig = CONFIG,
    identity: BackboneIdentity = IDENTITY,
    num_tasks: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint of this config holds."""
    tasks = task_table(num_tasks, biased=config.task_bias, document_template="{document}")
    made = adapters.random_tensors(identity, config, tasks, seed=seed)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def learned(start: StartingPoint, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a starting point of `mtlora merge`, after the most that training may change in them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(start.trainable[name], torch.randn(tensor.shape, generator=generator), tensor)
        for name, tensor in start.tensors.items()
    }


def write_random(folder: Path, *, seed: int = 0, **kwargs: Any) -> AdapterManifest:
    """Write a checkpoint of three tasks; `kwargs` replace arguments of `write_checkpoint`."""
    arguments: dict[str, Any] = {
        "backbone": IDENTITY, "config": CONFIG, "tasks": task_table(3), "tensors": random_tensors(seed=seed),
        "training": {"seed": seed},
    }  # fmt: skip
    return write_checkpoint(folder, **(arguments | kwargs))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's JSON."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def replace_tensors(folder: Path, content: bytes) -> None:
    """Replace the tensor file and its checksum, so that only its content can be wrong."""
    (folder / TENSORS_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(folder, lambda manifest: manifest.update(tensors_sha256=digest))


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensor file's header, checksum included."""
    header, data = split_tensors(folder)
    edit(header)
    replace_tensors(folder, join_tensors(json.dumps(header).encode(), data))


def split_tensors(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of the tensor file."""
    content = (folder / TENSORS_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_tensors(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def random_adapted(backbone: Path, config: MtLoRAConfig, num_tasks: int) -> "AdaptedModel":
    """A backbone with a random adapter, in float32, whose answers differ from the backbone's."""
    from mtlora.model.language import new_adapted_model

    made = new_adapted_model(backbone, config, num_tasks, torch.float32)
    torch.manual_seed(1)
    for parameter in made.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.adapters.eval()
    return made


def _write_tokenizer(folder: Path, num_tokens: int = 16384) -> None:
    """Few tokens, because each training run reads them all. A merge comes after those of its parts."""
    from mtlora.backbone import resolve

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve("default") / name, folder)
    tokenizer = json.loads((resolve("default") / "tokenizer.json").read_text())
    vocabulary = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < num_tokens}
    merges = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) in vocabulary]
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_tiny_backbone(folder: Path, *, hidden_size: int = 48, heads: int = 4) -> Path:
    """A backbone of random weights with the first tokens of the default backbone's tokenizer; returns the folder.

    vLLM's attention on CPUs takes heads of 32, 64 and more dimensions.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    _write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads // 2, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Tied embeddings at transformers' scale leave a model this narrow unable to prefer any token.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
