"""Ways to damage a checkpoint on disk."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE
from mtlora.checkpoint.read import read_manifest
from mtlora.config import MtLoRAConfig
from tests.factories import (
    IDENTITY,
    edit_header,
    edit_manifest,
    join_tensors,
    random_tensors,
    replace_tensors,
    split_tensors,
)

NAMED = "layers.0.mlp.lora_B"

Damage = Callable[[Path], object]


def manifest_bytes(content: bytes) -> Damage:
    return lambda folder: (folder / MANIFEST_FILE).write_bytes(content)


def manifest_set(*keys: str | int, to: Any) -> Damage:
    """Set manifest[keys[0]][keys[1]]… ."""

    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = to

    return lambda folder: edit_manifest(folder, edit)


def manifest_drop(*keys: str | int) -> Damage:
    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return lambda folder: edit_manifest(folder, edit)


def manifest_text(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        text = json.dumps(json.loads((folder / MANIFEST_FILE).read_text()))
        assert old in text
        (folder / MANIFEST_FILE).write_text(text.replace(old, new, 1))

    return damage


def tensors_cut(*, keep: Callable[[int, int], int]) -> Damage:
    """Keep the first `keep(header size, file size)` bytes of the tensor file."""

    def damage(folder: Path) -> None:
        content = (folder / TENSORS_FILE).read_bytes()
        replace_tensors(folder, content[: keep(int.from_bytes(content[:8], "little"), len(content))])

    return damage


def tensor_set(name: str, tensor: torch.Tensor | None) -> Damage:
    """Replace, add or (None) remove a tensor."""
    tensors = random_tensors() | {name: tensor}
    return lambda folder: replace_tensors(folder, save({n: t for n, t in tensors.items() if t is not None}))


def tensor_value(value: float, dtype: torch.dtype = torch.float32) -> Damage:
    def damage(folder: Path) -> None:
        tensors = random_tensors(dtype=dtype)
        tensors[NAMED][2, 7, 1] = value
        replace_tensors(folder, save(tensors))

    return damage


def header_set(key: str, to: Any) -> Damage:
    return lambda folder: edit_header(folder, lambda header: header[NAMED].update({key: to}))


def header_bytes(header: bytes) -> Damage:
    return lambda folder: replace_tensors(folder, join_tensors(header, split_tensors(folder)[1]))


def overlapping(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        header["layers.1.mlp.lora_B"]["data_offsets"] = header[NAMED]["data_offsets"]

    edit_header(folder, edit)


def gap(folder: Path) -> None:
    header, data = split_tensors(folder)
    for entry in header.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    replace_tensors(folder, join_tensors(json.dumps(header).encode(), bytes(4) + data))


def replaced_by(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def linked_outside(name: str) -> Damage:
    def damage(folder: Path) -> None:
        os.rename(folder / name, folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return damage


def linked_outside_in_two_steps(folder: Path) -> None:
    os.rename(folder / TENSORS_FILE, folder.parent / "outside")
    (folder / "inside").symlink_to(folder.parent)
    (folder / TENSORS_FILE).symlink_to("inside/outside")


def sparse(size: int) -> Damage:
    return lambda folder: os.truncate(folder / TENSORS_FILE, size)


def huge_and_consistent(folder: Path) -> None:
    """A manifest and a header that agree on 8 TiB, in a sparse file."""
    config = MtLoRAConfig(r=512, num_experts=256, num_groups=2)
    identity = IDENTITY.model_copy(update={"hidden_size": 1 << 20})
    manifest = read_manifest(folder).model_copy(update={"config": config, "backbone": identity})
    header, at = {}, 0
    for name, shape in manifest.tensor_shapes().items():
        end = at + 4 * math.prod(shape)
        header[name], at = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}, end
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    content = join_tensors(json.dumps(header).encode(), b"")
    (folder / TENSORS_FILE).write_bytes(content)
    os.truncate(folder / TENSORS_FILE, len(content) + at)
