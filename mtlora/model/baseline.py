"""Stores a trained baseline as a folder with `baseline.json` and `baseline.safetensors`. Servers cannot load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import CheckpointError, TaskEntry
from mtlora.errors import describe
from mtlora.files import folder_in_the_making, put_in_place, write_durably
from mtlora.methods import AnyBaseline
from mtlora.model.language import AdaptedModel, new_adapted_model

MANIFEST_FILE = "baseline.json"
TENSORS_FILE = "baseline.safetensors"


class BaselineManifest(BaseModel):
    """`baseline.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneIdentity
    config: AnyBaseline
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


def write_baseline(folder: Path, manifest: BaselineManifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a baseline, completely or not at all. Raises CheckpointError if it cannot be written."""
    stored = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    try:
        with folder_in_the_making(folder) as made:
            write_durably(made / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())
            write_durably(made / TENSORS_FILE, stored)
            put_in_place(made, folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def read_baseline_manifest(folder: Path) -> BaselineManifest:
    """Read `baseline.json`. Raises CheckpointError."""
    path = folder / MANIFEST_FILE
    try:
        return BaselineManifest.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_baseline(folder: Path, checkpoint: Path, dtype: torch.dtype) -> tuple[AdaptedModel, BaselineManifest]:
    """(the backbone at `folder` with the baseline at `checkpoint`, its manifest), in evaluation mode.

    Raises CheckpointError if it cannot be read or was trained beside another backbone.
    """
    manifest = read_baseline_manifest(checkpoint)
    adapted = new_adapted_model(folder, manifest.config, len(manifest.tasks), dtype)
    if manifest.backbone != adapted.backbone:
        raise CheckpointError(f"{checkpoint}: trained beside another backbone: {manifest.backbone!r}")
    try:
        adapted.adapters.load_state_dict(load_file(checkpoint / TENSORS_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint / TENSORS_FILE}: {error}") from None
    adapted.adapters.eval()
    return adapted, manifest
