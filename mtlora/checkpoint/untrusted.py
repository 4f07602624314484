"""Opens untrusted files inside one folder only, and parses them as strict JSON."""

import json
import math
import os
import reprlib
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, CheckpointError


def open_file(folder: Path, name: str) -> BufferedReader:
    """Open a regular file that lies inside `folder` after links are followed. Raises CheckpointError."""
    path = folder / name
    try:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: expected a folder of {MANIFEST_FILE} and {TENSORS_FILE}, found "
                + ("a file" if folder.exists() else "nothing")
            )
        root = folder.resolve(strict=True)
        # O_PATH does not open the content, so a pipe cannot block and a device is not touched. A link that changes
        # after the checks has no effect.
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


def json_object(path: Path, content: bytes) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no duplicate keys, finite numbers. Raises CheckpointError naming `path`."""
    try:
        raw = json.loads(
            content.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_no_duplicates,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _no_constant(value: str) -> None:
    raise ValueError(f"{value} is not JSON")


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
