"""Verifies each version in a child process under limits, so that a malicious file cannot harm the server.

The child copies the two files to the spool, up to the limits, and reads the copy as the engine will. The server reads
only verified copies.
"""

import asyncio
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from server.isolation import ChildEndedError, ChildError, in_child
from server.registry.check import NoEngineError, VerificationLimits, run_check
from server.registry.heads import Head, ServedProjector, read_heads, read_projector
from server.registry.source import Found
from server.registry.spool import Spool, SpoolFullError
from server.registry.storage import in_thread
from server.registry.version import ElsewhereError, Stage, StageError

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest
    from server.registry.check import Backbones

_AT_ONCE = 2


@dataclass(frozen=True)
class Verified:
    """A verified version: its content's hash, its copy in the spool, its manifest, and its heads and projector.

    heads: for image tasks. projector: for tasks of text and image.
    """

    content: str
    folder: Path
    manifest: "AdapterManifest"
    heads: Mapping[str, Head] = field(default_factory=dict)
    projector: ServedProjector | None = None


class Verifier:
    """Verifies versions for these backbones; `spool` keeps verified copies."""

    def __init__(self, spool: Spool, backbones: "Backbones", limits: VerificationLimits) -> None:
        self._spool = spool
        self._backbones = backbones
        self._limits = limits
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._processes: set[BaseProcess] = set()

    async def verify(self, root: Path, found: Found) -> Verified:
        """Verify a version found under `root`. Raises StageError with the reason if it is refused.

        The caller releases the copy by `Spool.release`.
        """
        await self._at_once.acquire()
        checking = in_thread(partial(self.verify_now, root, found), "verify")
        checking.add_done_callback(lambda _: self._at_once.release())
        try:
            return await asyncio.shield(checking)
        except asyncio.CancelledError:
            checking.add_done_callback(self._release_unwanted)
            raise

    def verify_now(self, root: Path, found: Found) -> Verified:
        """Like `verify`, in this thread."""
        from mtlora.checkpoint.read import read_manifest

        try:
            incoming = self._spool.incoming(min(found.size, self._limits.max_bytes))
        except SpoolFullError as error:
            raise StageError(Stage.VERIFIED, f"{found.folder}: {error}") from None
        try:
            content = self._in_child(root, found.folder, incoming)
            manifest = read_manifest(incoming)
            heads = read_heads(incoming, manifest) if manifest.images else {}
            projector = read_projector(incoming, manifest)
            return Verified(content, self._spool.keep(incoming, content), manifest, heads, projector)
        except BaseException as error:
            self._spool.discard(incoming)
            if isinstance(error, SpoolFullError):
                raise StageError(Stage.VERIFIED, f"{found.folder}: {error}") from None
            raise

    def _release_unwanted(self, checking: "asyncio.Future[Verified]") -> None:
        """Release the copy of a version whose caller was cancelled meanwhile."""
        if not checking.cancelled() and checking.exception() is None:
            self._spool.release(checking.result().content)

    def close(self) -> None:
        """End the running verifications."""
        for process in list(self._processes):
            process.kill()

    def _in_child(self, root: Path, folder: Path, incoming: Path) -> str:
        arguments = (root, folder, incoming, self._backbones, self._limits)
        try:
            (content,) = in_child(run_check, *arguments, limits=self._limits.of_child(), running=self._processes)
        except ChildEndedError as error:
            raise StageError(Stage.VERIFIED, f"{folder}: {error}") from None
        except ChildError as error:
            raise StageError(Stage.VERIFIED, str(error)) from None
        found = pickle.loads(content)
        if isinstance(found, NoEngineError):
            raise ElsewhereError(str(found))
        return str(found)
