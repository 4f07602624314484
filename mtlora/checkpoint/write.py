"""Writes checkpoints completely or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import (
    MANIFEST_FILE,
    TENSORS_FILE,
    AdapterManifest,
    CheckpointError,
    ProjectorConfig,
    TaskEntry,
    and_more,
    format_version,
)
from mtlora.checkpoint.read import check_answers, read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.errors import describe
from mtlora.files import folder_in_the_making, let_all_read, put_in_place, write_durably


def write_checkpoint(
    folder: Path,
    *,
    backbone: BackboneIdentity,
    config: MtLoRAConfig,
    tasks: tuple[TaskEntry, ...],
    tensors: Mapping[str, torch.Tensor],
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    calibration: Mapping[str, float] | None = None,
    projector: ProjectorConfig | None = None,
) -> AdapterManifest:
    """Write a checkpoint to `folder`, completely or not at all; an old checkpoint there is replaced in one step.

    A crash at any moment leaves the old checkpoint or the new one (`files.put_in_place` names the only exception). If
    `folder` is a link, its target is replaced. Raises CheckpointError if the checkpoint could not be read back, such as
    when tensors and config disagree; if `folder` holds anything else; or if it cannot be written.
    """
    try:
        folder = folder.resolve()
        check_replaceable(folder)
        stored = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
        manifest = AdapterManifest(
            format_version=format_version(config, tasks),
            backbone=backbone,
            config=config,
            tasks=tasks,
            projector=projector,
            tensors_sha256=hashlib.sha256(stored).hexdigest(),
            training=_as_json("training", training),
            evaluation=_as_json("evaluation", evaluation),
            calibration=dict(calibration or {}),
        )
        document = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
        with folder_in_the_making(folder) as made:
            write_durably(made / TENSORS_FILE, stored)
            write_durably(made / MANIFEST_FILE, (document + "\n").encode())
            try:
                check_answers(made, read_checkpoint(made).manifest)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(made), str(folder))) from None
            let_all_read(made)
            put_in_place(made, folder)
    except ValidationError as error:
        raise CheckpointError(f"{folder}: {describe(error)}") from None
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return manifest


def record_evaluation(
    folder: Path, evaluation: Mapping[str, Any], calibration: Mapping[str, float] | None = None
) -> None:
    """Replace only the scores in a checkpoint's manifest and, if given, the temperatures.

    Raises CheckpointError.
    """
    checkpoint = read_checkpoint(folder)
    manifest = checkpoint.manifest
    write_checkpoint(
        folder, backbone=manifest.backbone, config=manifest.config, tasks=manifest.tasks, tensors=checkpoint.tensors,
        training=manifest.training, evaluation=evaluation,
        calibration=manifest.calibration if calibration is None else calibration, projector=manifest.projector,
    )  # fmt: skip


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError if the folder holds anything that is not part of a checkpoint."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder or nothing, found a file")
    if others := sorted({path.name for path in folder.iterdir()} - {MANIFEST_FILE, TENSORS_FILE}):
        raise CheckpointError(
            f"{folder}: not replaced: holds {others[0]!r}, which is not a checkpoint file{and_more(others)}"
        )


def _as_json(field: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """`value` after a round trip through JSON."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(value or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{field}: cannot be written as JSON: {error}") from None
    return result
