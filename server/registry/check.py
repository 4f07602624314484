"""Checks an untrusted version: two files within limits, well formed, trained beside this backbone.

Runs in the verifier's child process, so it imports little: from the server, only file names.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.isolation import Limits
from server.job import Lane
from server.registry.source import MANIFEST_FILE, TENSORS_FILE

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.checkpoint.format import AdapterManifest, ProjectorConfig
    from mtlora.vision.families import VisionConfig

    # Backbones by lane; a server has one, or both.
    Backbones = Mapping[Lane, BackboneArchitecture]

_CHUNK = 1 << 20
# Most tasks: the server's catalog holds a row for each.
MAX_TASKS = 20_000


class NoEngineError(Exception):
    """The version is valid, but this server has no engine for it."""


@dataclass(frozen=True)
class VerificationLimits:
    """Limits of one verification.

    max_bytes: limit of both files together. timeout_s: seconds of wall time, and of processor time. headroom_bytes:
    memory for reading, besides two copies of the files. tokens: size of the backbone's vocabulary. vision: the
    architecture of the vision backbone, if there is one. image_size: side of a task's largest input.
    """

    max_bytes: int = 1 << 30
    timeout_s: float = 60.0
    headroom_bytes: int = 512 << 20
    tokens: int | None = None
    vision: "VisionConfig | None" = None
    image_size: int = 0

    def of_child(self) -> Limits:
        """Limits for the child process that reads the adapter."""
        # Let the engine's steps come first, but not alone: at 19, a new version waits for seconds on a busy machine.
        return Limits(
            self.timeout_s,
            memory_bytes=2 * self.max_bytes + self.headroom_bytes,
            file_bytes=self.max_bytes + _CHUNK,
            niceness=10,
        )


def run_check(
    root: Path, folder: Path, incoming: Path, backbones: "Backbones", limits: VerificationLimits
) -> Iterator[str | NoEngineError]:
    """`check` as a generator, for `in_child`."""
    import torch

    torch.set_num_threads(1)
    try:
        yield check(root, folder, incoming, backbones, limits)
    except NoEngineError as error:
        yield error


def check(root: Path, folder: Path, incoming: Path, backbones: "Backbones", limits: VerificationLimits) -> str:
    """Copy a version to `incoming` and read the copy; returns its content's hash.

    Raises CheckpointError; NoEngineError for a valid version without an engine here.

    Removes the provenance from the copy's manifest: it may be any JSON, and the server does not need it.
    """
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.checkpoint.read import check_answers, read_checkpoint, read_manifest

    real = folder.resolve()
    if not real.is_relative_to(root.resolve()):
        raise CheckpointError(f"{folder}: expected a folder inside {root}, found a link to {real}")
    _copy(folder, incoming, limits.max_bytes)
    try:
        backbone = _backbone_of(folder, read_manifest(incoming), backbones)
        manifest = read_checkpoint(incoming, backbone).manifest
        check_answers(incoming, manifest)
        if manifest.projector:
            _check_projector(folder, manifest.projector, backbones)
        if limits.vision:
            _check_images(incoming, manifest, limits.vision, limits.image_size)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(incoming), str(folder))) from None
    if len(manifest.tasks) > MAX_TASKS:
        raise CheckpointError(f"{folder}: tasks: expected at most {MAX_TASKS}, found {len(manifest.tasks)}")
    if limits.tokens is not None:
        _check_defaults(folder, manifest, limits.tokens)
    content = hashlib.sha256((incoming / MANIFEST_FILE).read_bytes()).hexdigest()
    serving = manifest.model_copy(update={"training": {}, "evaluation": {}})
    (incoming / MANIFEST_FILE).write_text(serving.model_dump_json())
    return content


def _copy(folder: Path, incoming: Path, max_bytes: int) -> None:
    """Copy both files of a version. Raises CheckpointError if they are too large."""
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.checkpoint.read import MAX_MANIFEST_BYTES
    from mtlora.checkpoint.untrusted import open_file

    left = max_bytes
    for name in (MANIFEST_FILE, TENSORS_FILE):
        with open_file(folder, name) as source, (incoming / name).open("xb") as copy:
            # Check the size first: a sparse file may claim any size without using disk space.
            size = os.fstat(source.fileno()).st_size
            if name == MANIFEST_FILE and size > MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{folder / name}: found {size} bytes; allowed: up to {MAX_MANIFEST_BYTES}")
            left -= size
            if left < 0:
                raise CheckpointError(f"{folder}: expected at most {max_bytes} bytes in all, found {max_bytes - left}")
            # If a file grows meanwhile, RLIMIT_FSIZE ends the child.
            shutil.copyfileobj(source, copy, _CHUNK)


def _check_defaults(folder: Path, manifest: "AdapterManifest", tokens: int) -> None:
    """Raise CheckpointError for a task whose defaults name a token that the backbone lacks. tokens: its vocabulary."""
    from mtlora.checkpoint.format import CheckpointError

    for task in manifest.tasks:
        if task.defaults and (largest := task.defaults.largest_token) >= tokens:
            raise CheckpointError(
                f"{folder}: task {task.id}: defaults: found token {largest}, expected those of the backbone, 0 to "
                f"{tokens - 1}"
            )


def _backbone_of(folder: Path, manifest: "AdapterManifest", backbones: "Backbones") -> "BackboneArchitecture":
    """The backbone that an adapter must have been trained beside. Raises NoEngineError."""
    lane, kind = (Lane.IMAGES, "images") if manifest.images else (Lane.TEXT, "texts")
    if lane not in backbones:
        setting = "vision_backbone" if manifest.images else "backbone"
        raise NoEngineError(f"{folder}: tasks of {kind}: expected a server with a backbone for them ({setting})")
    return backbones[lane]


def _check_projector(folder: Path, projector: "ProjectorConfig", backbones: "Backbones") -> None:
    """Raise NoEngineError without a vision backbone, CheckpointError if it is not the projector's."""
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.errors import differences

    if Lane.IMAGES not in backbones:
        found = "tasks of text and image: expected a server with a vision backbone too (vision_backbone)"
        raise NoEngineError(f"{folder}: {found}")
    for field, (expected, other) in differences(backbones[Lane.IMAGES], projector.backbone).items():
        where = f"{folder / MANIFEST_FILE}: projector.backbone.{field}"
        raise CheckpointError(f"{where}: expected {expected!r} (the vision backbone in use), found {other!r}")


def _check_images(folder: Path, manifest: "AdapterManifest", vision: "VisionConfig", largest: int) -> None:
    """Raise CheckpointError for a task whose images the backbone cannot take."""
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.errors import BackboneError

    for task in manifest.tasks:
        name, prepared = ("image", task.image) if task.image else ("picture", task.picture)
        if prepared is None:
            continue
        if prepared.size > largest:
            found = f"found {prepared.size}, expected at most {largest} (vision_max_size)"
            raise CheckpointError(f"{folder}: task {task.id}: {name}.size: {found}")
        try:
            vision.num_soft_tokens(prepared.size, manifest.projector.merge if manifest.projector else 1)
        except BackboneError as error:
            raise CheckpointError(f"{folder}: task {task.id}: {name}.size: {error}") from None
        if task.image and task.image.pooling != "mean" and not vision.traits.class_token:
            found = f"found {task.image.pooling!r}, expected mean: this backbone has no class token"
            raise CheckpointError(f"{folder}: task {task.id}: image.pooling: {found}")
