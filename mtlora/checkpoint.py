"""Checkpoint format, version 1: a folder of `adapter.json` and `adapter.safetensors`.

Tensors of layer l and module m (`self_attn` or `mlp`), where T = tasks, N = experts, g = groups, d = hidden size:

    layers.{l}.{m}.lora_A       [r, d]       down-projection shared by the experts
    layers.{l}.{m}.lora_B       [N, d, r]    experts
    layers.{l}.{m}.lora_route   [g*N, d]     router, group-major: row j*N + i is expert i in group j
    layers.{l}.{m}.task_bias    [T, g, N]    router bias per task, where the config has task_bias

Reading trusts nothing: every failure is one CheckpointError that says which file, which tensor, what was expected and
what was found.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mtlora.backbone import BackboneIdentity
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from mtlora.task import TaskSpec

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A task table of 10,000 tasks takes some 10 MiB.
_MAX_MANIFEST_BYTES = 64 << 20
# Room for the safetensors header: names, shapes and offsets.
_MAX_HEADER_BYTES = 8 << 20


class CheckpointError(MtLoRAError):
    """A checkpoint that cannot be written or read."""


class TaskEntry(TaskSpec):
    """A row of the task table."""

    bias_index: int | None = Field(None, ge=0, description="row of the router's task biases; null without task biases")


class AdapterManifest(BaseModel):
    """`adapter.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    backbone: BackboneIdentity
    config: MtLoRAConfig
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    tensors_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    training: dict[str, Any] = Field(default_factory=dict, description="provenance: how the adapter was made")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="what it scored when it was made")

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterManifest":
        self.config.check_hidden_size(self.backbone.hidden_size)
        seen: set[str] = set()
        for task in self.tasks:
            if task.id in seen:
                raise ValueError(f"task {task.id!r} appears twice in the task table")
            seen.add(task.id)
        indices = [task.bias_index for task in self.tasks]
        expected = list(range(len(self.tasks))) if self.config.task_bias else [None] * len(self.tasks)
        if sorted(indices, key=lambda i: -1 if i is None else i) != expected:
            wanted = f"0..{len(self.tasks) - 1}, each once" if self.config.task_bias else "null, as task_bias is off"
            raise ValueError(f"bias_index of the {len(self.tasks)} tasks must be {wanted}")
        return self

    def task(self, task_id: str) -> TaskEntry:
        """The entry of one task; KeyError where it has none."""
        for task in self.tasks:
            if task.id == task_id:
                return task
        raise KeyError(task_id)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor this manifest calls for."""
        return dict(_tensor_shapes(self.config, self.backbone, len(self.tasks)))


def _tensor_shapes(
    config: MtLoRAConfig, backbone: BackboneIdentity, num_tasks: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = backbone.hidden_size
    for layer in range(backbone.num_layers):
        for module in config.modules:
            prefix = f"layers.{layer}.{module}"
            yield f"{prefix}.lora_A", (config.r, d)
            yield f"{prefix}.lora_B", (config.num_experts, d, config.r)
            yield f"{prefix}.lora_route", (config.router_rows, d)
            if config.task_bias:
                yield f"{prefix}.task_bias", (num_tasks, config.num_groups, config.num_experts)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. Tensors are on the CPU, in the dtype they are stored in."""

    manifest: AdapterManifest
    tensors: dict[str, torch.Tensor]


def write_checkpoint(
    folder: Path,
    *,
    backbone: BackboneIdentity,
    config: MtLoRAConfig,
    tasks: tuple[TaskEntry, ...],
    tensors: Mapping[str, torch.Tensor],
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> AdapterManifest:
    """Write a checkpoint to `folder`, whole or not at all; one that is there is replaced by a rename.

    Raises CheckpointError where tensors and config disagree: what could not be read back is never written.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, made / TENSORS_FILE)
        _sync(made / TENSORS_FILE)
        try:
            manifest = AdapterManifest(
                backbone=backbone,
                config=config,
                tasks=tasks,
                tensors_sha256=_sha256(made / TENSORS_FILE),
                training=dict(training or {}),
                evaluation=dict(evaluation or {}),
            )
        except ValidationError as error:
            raise CheckpointError(f"{folder}: {_first_errors(error)}") from None
        with (made / MANIFEST_FILE).open("w") as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
        _sync(made / MANIFEST_FILE)
        read_checkpoint(made)
        _sync(made)
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")
        os.rename(made, folder)
        _sync(folder.parent)
    return manifest


def read_manifest(folder: Path) -> AdapterManifest:
    """Read and validate `adapter.json` alone. Raises CheckpointError."""
    path = _contained_file(folder, MANIFEST_FILE, _MAX_MANIFEST_BYTES)
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    if raw.get("format_version") != FORMAT_VERSION or isinstance(raw.get("format_version"), bool):
        found = raw.get("format_version", "none")
        raise CheckpointError(f"{path}: format_version: expected {FORMAT_VERSION}, found {found!r}")
    try:
        return AdapterManifest.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_errors(error)}") from None


def read_checkpoint(folder: Path, backbone: BackboneIdentity | None = None) -> Checkpoint:
    """Read and validate a checkpoint; with `backbone`, also that it was made beside this one. Raises CheckpointError."""
    manifest = read_manifest(folder)
    if backbone is not None:
        check_backbone(folder, manifest, backbone)
    shapes = manifest.tensor_shapes()
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    path = _contained_file(folder, TENSORS_FILE, 4 * elements + _MAX_HEADER_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, set(file.keys()), set(shapes))
            for name, shape in shapes.items():
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != shape:
                    raise CheckpointError(
                        f"{path}: tensor {name}: expected shape {list(shape)}, found {list(stored.get_shape())}"
                    )
                if stored.get_dtype() not in DTYPES:
                    allowed = ", ".join(DTYPES)
                    raise CheckpointError(
                        f"{path}: tensor {name}: expected dtype {allowed}, found {stored.get_dtype()}"
                    )
            found = _sha256(path)
            if found != manifest.tensors_sha256:
                raise CheckpointError(f"{path}: sha256: expected {manifest.tensors_sha256}, found {found}")
            # A copy: the mapped file could change or vanish under the tensors.
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{path}: tensor {name}: expected finite values, found {bad} NaN or infinite")
    return Checkpoint(manifest, tensors)


def check_backbone(folder: Path, manifest: AdapterManifest, backbone: BackboneIdentity) -> None:
    """Raise CheckpointError unless the adapter was made beside this backbone."""
    for field in BackboneIdentity.model_fields:
        expected, found = getattr(backbone, field), getattr(manifest.backbone, field)
        if expected != found:
            raise CheckpointError(
                f"{folder / MANIFEST_FILE}: backbone.{field}: expected {expected!r} (the backbone in use), found {found!r}"
            )


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise CheckpointError(f"{path}: tensor {missing[0]}: missing{_and_more(missing)}")
    if unexpected := sorted(found - expected):
        raise CheckpointError(f"{path}: tensor {unexpected[0]}: not part of this config{_and_more(unexpected)}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _contained_file(folder: Path, name: str, max_bytes: int) -> Path:
    """The path of a regular file that lies, links followed, inside `folder`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a checkpoint is a folder of {MANIFEST_FILE} and {TENSORS_FILE}")
    path = folder / name
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not real.is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path}: links to {real}, outside the checkpoint's folder")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    if status.st_size > max_bytes:
        raise CheckpointError(f"{path}: {status.st_size} bytes, expected at most {max_bytes}")
    return path


def _no_constant(value: str) -> None:
    raise ValueError(f"{value} is not allowed in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _first_errors(error: ValidationError) -> str:
    """The first few violations, one line: field, cause, what was found."""
    parts = []
    for item in error.errors(include_url=False)[:3]:
        where = ".".join(str(part) for part in item["loc"]) or "manifest"
        found = repr(item["input"])
        parts.append(f"{where}: {item['msg']}" + (f" (found {found})" if len(found) < 120 else ""))
    more = error.error_count() - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


