"""Reading and verifying checkpoints.

Files are untrusted. Every failure is a CheckpointError that names the file, the tensor or field, what was expected and
what was found. Each file is opened once, so the bytes that were checked are the bytes returned. The folder and its
files may be links, as in a mounted ConfigMap, if they end inside the folder.
"""

import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from mtlora.answer import AnswerError
from mtlora.backbone import BackboneArchitecture
from mtlora.checkpoint.format import (
    DTYPES,
    FORMAT_VERSIONS,
    MANIFEST_FILE,
    TENSORS_FILE,
    AdapterManifest,
    Checkpoint,
    CheckpointError,
    and_more,
)
from mtlora.checkpoint.untrusted import json_object, open_file
from mtlora.errors import describe, differences
from mtlora.files import signature

_T = TypeVar("_T")

_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
# A table of 10,000 tasks takes about 10 MiB.
MAX_MANIFEST_BYTES = 16 << 20
# The safetensors header: names, shapes and offsets.
_MAX_HEADER_BYTES = 8 << 20
# The published adapter for LLaMA-2-7B has 0.16 GB. The limit is needed because a manifest may claim any size, and a
# sparse file of that size takes no disk space.
_MAX_TENSORS_BYTES = 4 << 30


def check_answers(folder: Path, manifest: AdapterManifest) -> None:
    """Raise CheckpointError for an answer type that the decoder cannot enforce."""
    # Check each distinct type once: many tasks share one.
    checked: set[str] = set()
    for task in manifest.tasks:
        if (constraint := task.constraint()) and constraint.text not in checked:
            checked.add(constraint.text)
            try:
                task.check_answers()
            except AnswerError as error:
                raise CheckpointError(f"{folder}: {error}") from None


def read_manifest(folder: Path) -> AdapterManifest:
    """Read and validate `adapter.json` alone. Raises CheckpointError."""
    return _unless_replaced(folder, lambda: _read_manifest(folder))


def read_checkpoint(folder: Path, backbone: BackboneArchitecture | None = None) -> Checkpoint:
    """Read and validate a checkpoint and, if given, that it was made beside `backbone`. Raises CheckpointError.

    The tensors of one checkpoint share one buffer.
    """
    return _unless_replaced(folder, lambda: _read_checkpoint(folder, backbone))


def check_backbone(folder: Path, manifest: AdapterManifest, backbone: BackboneArchitecture) -> None:
    """Raise CheckpointError unless the adapter's backbone agrees in all fields of `backbone`."""
    for field, (expected, found) in differences(backbone, manifest.backbone).items():
        where = f"{folder / MANIFEST_FILE}: backbone.{field}"
        raise CheckpointError(f"{where}: expected {expected!r} (the backbone in use), found {found!r}")


def _unless_replaced(folder: Path, read: Callable[[], _T]) -> _T:
    """Call `read()`; if it fails because the checkpoint was replaced meanwhile, call it again."""
    for _ in range(3):
        before = [signature(folder / name) for name in (MANIFEST_FILE, TENSORS_FILE)]
        try:
            return read()
        except CheckpointError:
            if [signature(folder / name) for name in (MANIFEST_FILE, TENSORS_FILE)] == before:
                raise
    return read()


def _read_manifest(folder: Path) -> AdapterManifest:
    path = folder / MANIFEST_FILE
    with open_file(folder, MANIFEST_FILE) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, found more")
    raw = json_object(path, content)
    version = raw.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        allowed = " or ".join(map(str, FORMAT_VERSIONS))
        found = reprlib.repr(version) if "format_version" in raw else "none"
        raise CheckpointError(f"{path}: format_version: expected {allowed}, found {found}")
    try:
        # Strict mode rejects "16" as a number and true as 1. Parse the JSON again: strict mode allows an array for a
        # tuple only in JSON.
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
        # Check the header before allocating memory for the data.
        preamble = _read_preamble(path, file)
        layout = _layout(path, json_object(path, preamble[8:]), shapes, size - len(preamble))
        data = bytearray(size - len(preamble))
        if file.readinto(data) != len(data) or file.read(1):
            raise CheckpointError(f"{path}: expected {size} bytes, found another size: it is being written to")
    tensors = {
        name: torch.frombuffer(data, dtype=dtype, count=math.prod(shapes[name]), offset=begin).view(shapes[name])
        for name, (dtype, begin) in layout.items()
    }
    for name, tensor in tensors.items():
        if bad := count_not_finite(tensor):
            raise CheckpointError(f"{path}: tensor {name}: expected finite values, found {bad} NaN or infinite")
    # Check the hash last: the checks above give more exact errors.
    digest = hashlib.sha256(preamble)
    digest.update(data)
    if digest.hexdigest() != manifest.tensors_sha256:
        raise CheckpointError(f"{path}: sha256: expected {manifest.tensors_sha256}, found {digest.hexdigest()}")
    return Checkpoint(manifest, tensors)


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or infinite: their exponent is all ones.

    Uses numpy: torch's parallel reductions would wait for threads that a busy engine uses.
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
    """(dtype, offset into the data) of each tensor. The tensors must fill the data exactly."""
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
        raise CheckpointError(f"{path}: tensor {missing[0]}: expected by the config, found none{and_more(missing)}")
    if unexpected := sorted(found - expected):
        name = reprlib.repr(unexpected[0])
        raise CheckpointError(f"{path}: unexpected tensor {name}: this config has no such part{and_more(unexpected)}")
