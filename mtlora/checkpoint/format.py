"""Checkpoint format, version 1: a folder of `adapter.json` and `adapter.safetensors`.

Tensors of layer l and module m (`self_attn` or `mlp`), where T = tasks, N = experts, g = groups, d = hidden size:

    layers.{l}.{m}.lora_A       [r, d]       down-projection shared by the experts
    layers.{l}.{m}.lora_B       [N, d, r]    experts
    layers.{l}.{m}.lora_route   [g*N, d]     router, group-major: row j*N + i is expert i in group j
    layers.{l}.{m}.task_bias    [T, g, N]    router bias per task, where the config has task_bias

Reading trusts nothing: every failure is one CheckpointError that says which file, which tensor or field, what was
expected and what was found. Each file is opened once, and what is checked is what is returned. The folder, and the
files within it, may be links (as in a mounted ConfigMap), so long as they end inside the folder.
"""

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save

from mtlora.backbone import BackboneArchitecture, BackboneIdentity
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError, describe
from mtlora.files import folder_in_the_making, put_in_place, write_durably
from mtlora.task import TaskSpec

_T = TypeVar("_T")

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
# A task table of 10,000 tasks takes some 10 MiB.
MAX_MANIFEST_BYTES = 16 << 20
# The safetensors header: names, shapes and offsets.
_MAX_HEADER_BYTES = 8 << 20
# The published adapter for LLaMA-2-7B has 0.16 GB. A manifest may claim any size, and a sparse file costs nothing.
_MAX_TENSORS_BYTES = 4 << 30


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
                raise ValueError(f"tasks: id: expected each once, found {task.id!r} twice")
            seen.add(task.id)
        indices = [task.bias_index for task in self.tasks]
        expected = list(range(len(self.tasks))) if self.config.task_bias else [None] * len(self.tasks)
        if sorted(indices, key=lambda i: -1 if i is None else i) != expected:
            wanted = f"0 to {len(self.tasks) - 1}, each once" if self.config.task_bias else "null, as task_bias is off"
            raise ValueError(f"tasks: bias_index: expected {wanted}, found {reprlib.repr(indices)}")
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


@dataclass(frozen=True, eq=False)
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
    """Write a checkpoint to `folder`, whole or not at all; one that is there is replaced in one step.

    A crash at any moment leaves the old checkpoint or the new one (`files.put_in_place` has the one exception). Where
    `folder` is a link, what it points to is replaced. Raises CheckpointError where tensors and config disagree (what
    could not be read back is never written), where `folder` holds anything else, or where the disk refuses.
    """
    try:
        folder = folder.resolve()
        check_replaceable(folder)
        stored = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
        manifest = AdapterManifest(
            backbone=backbone,
            config=config,
            tasks=tasks,
            tensors_sha256=hashlib.sha256(stored).hexdigest(),
            training=_as_json("training", training),
            evaluation=_as_json("evaluation", evaluation),
        )
        document = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
        with folder_in_the_making(folder) as made:
            write_durably(made / TENSORS_FILE, stored)
            write_durably(made / MANIFEST_FILE, (document + "\n").encode())
            try:
                read_checkpoint(made)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(made), str(folder))) from None
            put_in_place(made, folder)
    except ValidationError as error:
        raise CheckpointError(f"{folder}: {describe(error)}") from None
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return manifest


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError where `folder` is no checkpoint, such as the home directory: it is not replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder or nothing, found a file")
    if others := sorted({path.name for path in folder.iterdir()} - {MANIFEST_FILE, TENSORS_FILE}):
        raise CheckpointError(f"{folder}: not replaced: {others[0]!r} is no part of a checkpoint{_and_more(others)}")


def _as_json(field: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """`value` as it will be read back."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(value or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{field}: expected what JSON can hold, found otherwise: {error}") from None
    return result


def read_manifest(folder: Path) -> AdapterManifest:
    """Read and validate `adapter.json` alone. Raises CheckpointError."""
    return _unless_replaced(folder, lambda: _read_manifest(folder))


def read_checkpoint(folder: Path, backbone: BackboneArchitecture | None = None) -> Checkpoint:
    """Read and validate a checkpoint; with `backbone`, also that it was made beside it. Raises CheckpointError.

    The tensors of one checkpoint share one buffer.
    """
    return _unless_replaced(folder, lambda: _read_checkpoint(folder, backbone))


def check_backbone(folder: Path, manifest: AdapterManifest, backbone: BackboneArchitecture) -> None:
    """Raise CheckpointError unless the adapter was made beside this backbone, or beside one of this architecture."""
    for field in type(backbone).model_fields:
        expected, found = getattr(backbone, field), getattr(manifest.backbone, field)
        if expected != found:
            where = f"{folder / MANIFEST_FILE}: backbone.{field}"
            raise CheckpointError(f"{where}: expected {expected!r} (the backbone in use), found {found!r}")


def _unless_replaced(folder: Path, read: Callable[[], _T]) -> _T:
    """`read()`, again where it failed on a mix of two checkpoints because one took the other's place meanwhile."""
    for _ in range(3):
        before = _generation(folder)
        try:
            return read()
        except CheckpointError:
            if _generation(folder) == before:
                raise
    return read()


def _generation(folder: Path) -> list[tuple[int, int, int] | None]:
    result: list[tuple[int, int, int] | None] = []
    for name in (MANIFEST_FILE, TENSORS_FILE):
        try:
            status = (folder / name).stat()
            result.append((status.st_dev, status.st_ino, status.st_ctime_ns))
        except (OSError, ValueError):
            result.append(None)
    return result


def _read_manifest(folder: Path) -> AdapterManifest:
    path = folder / MANIFEST_FILE
    with open_file(folder, MANIFEST_FILE) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, found more")
    raw = _json_object(path, content)
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        found = reprlib.repr(version) if "format_version" in raw else "none"
        raise CheckpointError(f"{path}: format_version: expected {FORMAT_VERSION}, found {found}")
    try:
        # From JSON again: in strict mode "16" is no number and true is no 1, but an array may be a tuple.
        return AdapterManifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from None


def _read_checkpoint(folder: Path, backbone: BackboneArchitecture | None) -> Checkpoint:
    manifest = _read_manifest(folder)
    if backbone is not None:
        check_backbone(folder, manifest, backbone)
    path = folder / TENSORS_FILE
    shapes = manifest.tensor_shapes()
    with open_file(folder, TENSORS_FILE) as file:
        size = os.fstat(file.fileno()).st_size
        # The header first, so that its claims are checked before memory is given to the rest.
        preamble = _read_preamble(path, file)
        layout = _layout(path, _json_object(path, preamble[8:]), shapes, size - len(preamble))
        data = bytearray(size - len(preamble))
        if file.readinto(data) != len(data) or file.read(1):
            raise CheckpointError(f"{path}: expected {size} bytes, found another size: it is being written to")
    tensors = {
        name: torch.frombuffer(data, dtype=dtype, count=math.prod(shapes[name]), offset=begin).view(shapes[name])
        for name, (dtype, begin) in layout.items()
    }
    for name, tensor in tensors.items():
        if bad := _count_not_finite(tensor):
            raise CheckpointError(f"{path}: tensor {name}: expected finite values, found {bad} NaN or infinite")
    # Last, since it says only that something differs; the checks above say what.
    digest = hashlib.sha256(preamble)
    digest.update(data)
    if digest.hexdigest() != manifest.tensors_sha256:
        raise CheckpointError(f"{path}: sha256: expected {manifest.tensors_sha256}, found {digest.hexdigest()}")
    return Checkpoint(manifest, tensors)


def _count_not_finite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or infinite: those whose exponent is all ones.

    In numpy, since each of torch's parallel reductions waits for threads that a busy engine holds.
    """
    integers, exponent = _EXPONENTS[tensor.dtype]
    return int(((tensor.view(integers).numpy() & exponent) == exponent).sum())


def _read_preamble(path: Path, file: BufferedReader) -> bytes:
    """The header's size and the header itself, of a safetensors file."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: expected 8 bytes of header size, found {len(prefix)}")
    header_size = int.from_bytes(prefix, "little")
    if header_size > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header: expected at most {_MAX_HEADER_BYTES} bytes, found {header_size}")
    header = file.read(header_size)
    if len(header) < header_size:
        raise CheckpointError(f"{path}: truncated: expected {header_size} bytes of header, found {len(header)}")
    return prefix + header


def _layout(
    path: Path, header: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], data_size: int
) -> dict[str, tuple[torch.dtype, int]]:
    """(dtype, offset into the data) of each tensor, which together fill the data exactly."""
    header.pop("__metadata__", None)
    _check_names(path, set(header), set(shapes))
    result: dict[str, tuple[torch.dtype, int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, shape in shapes.items():
        dtype, begin, end = _tensor_span(f"{path}: tensor {name}", header[name], shape)
        result[name] = dtype, begin
        spans.append((begin, end, name))
    filled = 0
    for begin, end, name in sorted(spans):
        if begin != filled:
            raise CheckpointError(f"{path}: tensor {name}: data_offsets: expected to begin at {filled}, found {begin}")
        filled = end
    if filled != data_size:
        state = "truncated: " if data_size < filled else ""
        raise CheckpointError(f"{path}: {state}expected {filled} bytes of tensors, found {data_size}")
    if filled > _MAX_TENSORS_BYTES:
        raise CheckpointError(f"{path}: expected at most {_MAX_TENSORS_BYTES} bytes of tensors, found {filled}")
    return result


def _tensor_span(where: str, entry: Any, shape: tuple[int, ...]) -> tuple[torch.dtype, int, int]:
    """(dtype, begin, end) of one tensor's entry in the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {reprlib.repr(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: expected dtype {' or '.join(DTYPES)}, found {reprlib.repr(entry['dtype'])}")
    if entry["shape"] != list(shape):
        raise CheckpointError(f"{where}: expected shape {list(shape)}, found {reprlib.repr(entry['shape'])}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise CheckpointError(f"{where}: data_offsets: expected two integers, found {reprlib.repr(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        size = math.prod(shape) * dtype.itemsize
        raise CheckpointError(f"{where}: data_offsets: expected {size} bytes, found {reprlib.repr(offsets)}")
    return dtype, begin, end


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise CheckpointError(f"{path}: tensor {missing[0]}: expected by the config, found none{_and_more(missing)}")
    if unexpected := sorted(found - expected):
        name = reprlib.repr(unexpected[0])
        raise CheckpointError(f"{path}: tensor {name}: found, but no part of this config{_and_more(unexpected)}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def open_file(folder: Path, name: str) -> BufferedReader:
    """Open a regular file that lies, links followed, inside `folder`. Raises CheckpointError."""
    path = folder / name
    try:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: expected a folder of {MANIFEST_FILE} and {TENSORS_FILE}, found "
                + ("a file" if folder.exists() else "nothing")
            )
        root = folder.resolve(strict=True)
        # O_PATH only names the file: a pipe cannot block it, a device does not notice, and a link that changes after
        # the checks changes nothing.
        descriptor = os.open(root / name, os.O_PATH | os.O_CLOEXEC)
        try:
            handle = Path(f"/proc/self/fd/{descriptor}")
            real = handle.readlink()
            if not real.is_relative_to(root):
                raise CheckpointError(f"{path}: expected a file inside the checkpoint's folder, found a link to {real}")
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a special file"
                raise CheckpointError(f"{path}: expected a regular file, found {kind}")
            return handle.open("rb")
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{path}: expected a readable file, found none: {cause}") from None


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(
            content.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_no_duplicates,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected UTF-8, found otherwise: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found otherwise: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _no_constant(value: str) -> None:
    raise ValueError(f"{value} is no JSON")


def _finite(value: str) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"the number {value} is out of range")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {reprlib.repr(key)}")
        result[key] = value
    return result
