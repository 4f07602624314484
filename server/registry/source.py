"""Lists a folder of adapters (NAME/VERSION/) at one moment. Reads only names and file attributes."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
MANIFEST_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
# The leading dot hides it from the scan.
UPLOADS_FOLDER = ".uploads"

# Signature of both files: device, inode, size, change time, the link's inode. Equal signatures mean equal content.
Signature = tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True)
class Found:
    """A version's folder. `signature` is empty while a file is missing."""

    name: str
    version: str
    folder: Path
    signature: Signature

    @property
    def complete(self) -> bool:
        return bool(self.signature)

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return sum(size for _, _, size, _, _ in self.signature)


@dataclass(frozen=True)
class AdapterFailure:
    """An adapter, version or claimed task that is not served, and the reason."""

    name: str
    version: str
    reason: str


def scan(root: Path, beat: Callable[[], None] = lambda: None) -> tuple[list[Found], list[AdapterFailure]]:
    """Every version under `root`, and every folder that cannot be one. Raises OSError if `root` cannot be read.

    Calls `beat` after each folder. Skips hidden folders: unfinished writes, or a mount's own.
    """
    found: list[Found] = []
    misnamed: list[AdapterFailure] = []
    for adapter in _folders(root):
        beat()
        if not NAME.fullmatch(adapter.name):
            misnamed.append(AdapterFailure(adapter.name, "", f"name must match {NAME.pattern}"))
            continue
        try:
            versions = list(_folders(adapter))
        except OSError:
            # The folder was removed meanwhile.
            continue
        if not versions:
            misnamed.append(AdapterFailure(adapter.name, "", "no version folder; an adapter is NAME/VERSION/"))
        for version in versions:
            beat()
            if not NAME.fullmatch(version.name):
                misnamed.append(AdapterFailure(adapter.name, version.name, f"version must match {NAME.pattern}"))
            else:
                found.append(Found(adapter.name, version.name, version, signature_of(version)))
    return found, misnamed


def signature_of(folder: Path) -> Signature:
    """The signature of a version's files; empty if one is missing."""
    result = []
    for name in (MANIFEST_FILE, TENSORS_FILE):
        path = folder / name
        try:
            # Include the link's own inode, because a mounted ConfigMap changes by a new link.
            status, target = path.stat(), path.lstat()
        except (OSError, ValueError):
            if not path.is_symlink():
                return ()
            # Count a broken link as a file, so that verification refuses it with a message.
            status = target = path.lstat()
        result.append((status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns, target.st_ino))
    return tuple(result)


def _folders(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.is_dir():
            yield path
