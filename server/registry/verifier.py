"""Verifies each version in a child process under limits, so that reading a bad file cannot harm the server.

multiprocessing's fork server imports the checkpoint reader once and forks a child for each version. The child copies
the two files to the spool, up to the limits, and reads the copy as the engine will. The server reads only what passed.
"""

import asyncio
import multiprocessing
import signal
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from server.registry.check import VerificationLimits, run_check
from server.registry.source import Found
from server.registry.spool import Spool, SpoolFullError
from server.registry.storage import in_thread
from server.registry.version import Stage, StageError

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.checkpoint.format import AdapterManifest

_AT_ONCE = 2
_KILL_S = 5.0


@dataclass(frozen=True)
class Verified:
    """A version that passed: its content's hash, its copy in the spool, its manifest."""

    content: str
    folder: Path
    manifest: "AdapterManifest"


class Verifier:
    """Verifies versions for `backbone`; `spool` keeps the copies that pass."""

    def __init__(self, spool: Spool, backbone: "BackboneArchitecture", limits: VerificationLimits) -> None:
        self._spool = spool
        self._backbone = backbone
        self._limits = limits
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mtlora.checkpoint.read", "server.registry.check"])
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._processes: set[BaseProcess] = set()

    async def verify(self, root: Path, found: Found) -> Verified:
        """Verify what was found under `root`. Raises StageError with the reason of a refusal.

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
        """As `verify`, in this thread."""
        from mtlora.checkpoint.read import read_manifest

        try:
            incoming = self._spool.incoming(min(found.size, self._limits.max_bytes))
        except SpoolFullError as error:
            raise StageError(Stage.VERIFIED, f"{found.folder}: {error}") from None
        try:
            content = self._in_child(root, found.folder, incoming)
            manifest = read_manifest(incoming)
            return Verified(content, self._spool.keep(incoming, content), manifest)
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
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (sender, root, folder, incoming, self._backbone, self._limits)
        process = self._context.Process(target=run_check, args=arguments, name="mtlora-verify", daemon=True)
        process.start()
        self._processes.add(process)
        sender.close()
        try:
            if not receiver.poll(self._limits.timeout_s):
                raise StageError(Stage.VERIFIED, f"{folder}: not read within {self._limits.timeout_s:g} s")
            try:
                passed, text = receiver.recv()
            except EOFError:
                process.join(5)
                raise StageError(Stage.VERIFIED, f"{folder}: {_death(process.exitcode, self._limits)}") from None
        finally:
            process.kill()
            # A process that waits for storage may outlive this for as long as the kernel waits.
            process.join(_KILL_S)
            self._processes.discard(process)
            receiver.close()
        if not passed:
            raise StageError(Stage.VERIFIED, text)
        return str(text)


def _death(exit_code: int | None, limits: VerificationLimits) -> str:
    if exit_code == -signal.SIGXCPU:
        return f"reading it took more than {limits.timeout_s:g} s of a core"
    return f"reading it ended the process that read it (exit status {exit_code})"
