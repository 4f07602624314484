"""Receives checkpoints in pieces, in `.uploads/ADAPTER--CONTENT/` of the folder of adapters until they are complete.

Received bytes are kept for a day, even over a broken connection or the server's restart. A complete checkpoint is
verified like those in the folder, then a rename makes it the adapter's next version.
"""

import asyncio
import contextlib
import errno
import hashlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc

from server.errors import RequestFailedError, Violation, invalid_argument, resource_exhausted
from server.registry.source import MANIFEST_FILE, NAME, TENSORS_FILE, UPLOADS_FOLDER, Found, signature_of
from server.registry.storage import Storage
from server.registry.version import StageError
from server.settings import Settings

_KEPT_S = 86400.0
_CONTENT = re.compile(r"[0-9a-f]{64}")
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

_T = TypeVar("_T")

# Verifies a version found under the root. Raises StageError.
Verify = Callable[[Path, Found], Awaitable[None]]


@dataclass(frozen=True)
class Announced:
    """An upload as announced by its first message. content: sha256 of the manifest."""

    adapter: str
    content: str
    manifest_bytes: int
    tensors_bytes: int

    @property
    def bytes(self) -> int:
        return self.manifest_bytes + self.tensors_bytes

    def violations(self, max_bytes: int) -> Iterator[Violation]:
        """Violations in its fields."""
        if not NAME.fullmatch(self.adapter):
            yield Violation("begin.adapter", f"found {self.adapter[:32]!r}; allowed: what matches {NAME.pattern}")
        if not _CONTENT.fullmatch(self.content):
            yield Violation("begin.content", f"found {self.content[:80]!r}; allowed: a sha256, 64 hexadecimal digits")
        for name in ("manifest_bytes", "tensors_bytes"):
            if not 0 < getattr(self, name) <= max_bytes:
                found = getattr(self, name)
                yield Violation(f"begin.{name}", f"found {found}; allowed: 1 to {max_bytes} (max_adapter_mib)")
        if self.bytes > max_bytes:
            yield Violation("begin", f"found {self.bytes} bytes in all; allowed: up to {max_bytes} (max_adapter_mib)")


class Uploads:
    """root: the folder of adapters; None if this machine has no such folder. max_uploads: unfinished uploads kept.

    Methods raise RequestFailedError, and StageError for a checkpoint that does not verify.
    """

    def __init__(
        self,
        root: Path | None,
        verify: Verify,
        storage: Storage,
        *,
        max_bytes: int,
        max_uploads: int,
        max_chunk_bytes: int,
    ) -> None:
        self.max_chunk_bytes = max_chunk_bytes
        self._root = root
        self._verify = verify
        self._storage = storage
        self._max_bytes = max_bytes
        self._max_uploads = max_uploads
        # The call that currently continues each upload: a later call takes over from one whose connection broke.
        self.owners: dict[str, Incoming] = {}

    @classmethod
    def from_settings(cls, settings: Settings, root: Path | None, verify: Verify, storage: Storage) -> "Uploads":
        return cls(
            root,
            verify,
            storage,
            max_bytes=settings.max_adapter_mib << 20,
            max_uploads=settings.max_uploads,
            # Leave room for the rest of the message.
            max_chunk_bytes=settings.message_limit - 256,
        )

    async def begin(self, announced: Announced) -> "Incoming":
        """Begin or resume an upload at the byte up to which it was received."""
        if violations := list(announced.violations(self._max_bytes)):
            raise invalid_argument(violations)
        if self._root is None or not self._max_uploads:
            why = "uploads are off (max_uploads)" if self._root else "this server has no folder of adapters of its own"
            raise _not_possible(f"{why}; publish to the storage that the server reads its adapters from")
        upload = Incoming(self, self._root, announced, self._verify, self._storage)
        before = self.owners.get(upload.key)
        self.owners[upload.key] = upload
        try:
            if before is not None:
                # The earlier call's last piece may still be being written.
                async with before.writing:
                    pass
            await upload.call(partial(self._open, self._root, upload))
        except BaseException:
            upload.leave()
            raise
        return upload

    def _open(self, root: Path, upload: "Incoming") -> None:
        if version := _version_with(root / upload.announced.adapter, upload.announced):
            upload.version, upload.received = version, upload.announced.bytes
            return
        folder = root / UPLOADS_FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        others = []
        for other in folder.iterdir():
            if other.name == upload.key:
                continue
            if other.name not in self.owners and time.time() - other.stat().st_mtime > _KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
            else:
                others.append(other)
        if len(others) >= self._max_uploads:
            raise resource_exhausted(
                f"{len(others)} uploads are unfinished, the limit of max_uploads; finish one, or wait a day", 60.0
            )
        upload.folder.mkdir(mode=0o700, exist_ok=True)
        upload.received = sum(path.stat().st_size for path in upload.files if path.exists())
        if upload.received > upload.announced.bytes:
            upload.clear()


class Incoming:
    """One call's part of an upload. received: bytes that are there. version: the whole's name in the folder."""

    def __init__(self, uploads: Uploads, root: Path, announced: Announced, verify: Verify, storage: Storage) -> None:
        self.announced = announced
        self.key = f"{announced.adapter}--{announced.content}"
        self.folder = root / UPLOADS_FOLDER / self.key
        self.files = (self.folder / MANIFEST_FILE, self.folder / TENSORS_FILE)
        self.received = 0
        self.version = ""
        self.writing = asyncio.Lock()
        self._owners = uploads.owners
        self._root = root
        self._verify = verify
        self._storage = storage

    @property
    def whole(self) -> bool:
        return self.received == self.announced.bytes

    async def write(self, offset: int, data: bytes) -> None:
        """Add the next bytes."""
        if offset != self.received:
            raise invalid_argument(
                [Violation("chunk.offset", f"found {offset}; allowed: {self.received}, the number of bytes received")]
            )
        if not data or offset + len(data) > self.announced.bytes:
            left = self.announced.bytes - offset
            raise invalid_argument([Violation("chunk.data", f"found {len(data)} bytes; allowed: 1 to {left}")])
        async with self.writing:
            if self._owners.get(self.key) is not self:
                raise RequestFailedError(grpc.StatusCode.ABORTED, "another call has taken over this upload")
            await self.call(partial(self._write, offset, data))
        self.received += len(data)

    async def finish(self) -> str:
        """Verify the checkpoint and publish it as the adapter's next version; returns the version."""
        async with self.writing:
            try:
                await self.call(self._check_content)
                signature = await self.call(partial(signature_of, self.folder))
                found = Found(self.announced.adapter, "upload", self.folder, signature)
                await self._verify(self._root, found)
                self.version = await self.call(self._put_in_place)
            except (StageError, RequestFailedError) as error:
                if isinstance(error, StageError) or error.code is grpc.StatusCode.INVALID_ARGUMENT:
                    # Delete these bytes: another attempt with them would fail again.
                    await self.call(self.clear)
                raise
        self.leave()
        return self.version

    def leave(self) -> None:
        """Note that the call has ended."""
        if self._owners.get(self.key) is self:
            del self._owners[self.key]

    async def call(self, work: Callable[[], _T]) -> _T:
        """Run disk work in a thread."""
        try:
            return await self._storage.call(lambda _: work())
        except OSError as error:
            if error.errno in _READ_ONLY:
                raise _not_possible(f"the folder of adapters cannot be written: {error.strerror}") from None
            raise resource_exhausted(f"the folder of adapters takes no more data: {error}", 10.0) from None

    def clear(self) -> None:
        """Delete the received bytes."""
        self.received = 0
        for path in self.files:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _write(self, offset: int, data: bytes) -> None:
        inside = max(0, min(len(data), self.announced.manifest_bytes - offset))
        at = max(0, offset - self.announced.manifest_bytes)
        for path, begin, part in ((self.files[0], offset, data[:inside]), (self.files[1], at, data[inside:])):
            if part:
                self.folder.mkdir(mode=0o700, exist_ok=True)
                with path.open("r+b" if path.exists() else "xb") as file:
                    file.seek(begin)
                    file.write(part)

    def _check_content(self) -> None:
        found = hashlib.sha256(self.files[0].read_bytes()).hexdigest()
        if found != self.announced.content:
            raise invalid_argument(
                [Violation("begin.content", f"found a manifest of sha256 {found}; allowed: {self.announced.content}")]
            )

    def _put_in_place(self) -> str:
        from mtlora.checkpoint.publish import put_version
        from mtlora.files import let_all_read, make_folders, sync

        adapter = self._root / self.announced.adapter
        make_folders(adapter)
        for path in self.files:
            sync(path)
        let_all_read(self.folder)
        sync(self.folder)
        return put_version(self.folder, adapter).name


def _version_with(adapter: Path, announced: Announced) -> str:
    """The version of an adapter that has this content, "" if none: the reply to its last piece may have been lost."""
    versions = adapter.iterdir() if adapter.is_dir() else ()
    for manifest in (version / MANIFEST_FILE for version in versions if NAME.fullmatch(version.name)):
        if (
            manifest.is_file()
            and manifest.stat().st_size == announced.manifest_bytes
            and hashlib.sha256(manifest.read_bytes()).hexdigest() == announced.content
        ):
            return manifest.parent.name
    return ""


def _not_possible(message: str) -> RequestFailedError:
    return RequestFailedError(grpc.StatusCode.FAILED_PRECONDITION, message)
