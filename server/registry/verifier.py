"""Checks a version in a process of its own, under limits, so that no file can hurt the server by being looked at.

A server process of multiprocessing's, with the checkpoint reader imported, forks one child a version. The child copies
the two files to the spool, never more than allowed, and reads the copy as the engine will. The parent reads nothing
that a child has not passed.
"""

import asyncio
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.registry.check import PRELOAD, VerificationLimits, run_check
from server.registry.source import Found
from server.registry.spool import Spool
from server.registry.version import Stage, StageError

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.checkpoint.format import AdapterManifest

_AT_ONCE = 2


@dataclass(frozen=True)
class Verified:
    """A version that passed: its content's hash, the kept copy and its manifest."""

    content: str
    folder: Path
    manifest: "AdapterManifest"


class Verifier:
    """Checks versions beside `backbone`; what passes is in `spool`."""

    def __init__(self, spool: Spool, backbone: "BackboneArchitecture", limits: VerificationLimits) -> None:
        self._spool = spool
        self._backbone = backbone
        self._limits = limits
        self._cores = os.sched_getaffinity(0)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._pool = ThreadPoolExecutor(_AT_ONCE, "verify")

    async def verify(self, root: Path, found: Found) -> Verified:
        """Check what was found under `root`. Raises StageError with the reason why it is refused.

        The kept copy wants one `Spool.release`.
        """
        checking = asyncio.get_running_loop().run_in_executor(self._pool, self.verify_now, root, found)
        try:
            return await asyncio.shield(checking)
        except asyncio.CancelledError:
            checking.add_done_callback(self._release_unwanted)
            raise

    def verify_now(self, root: Path, found: Found) -> Verified:
        """As `verify`, for threads."""
        from mtlora.checkpoint.read import read_manifest

        incoming = self._spool.incoming()
        try:
            content = self._in_child(root, found.folder, incoming)
            manifest = read_manifest(incoming)
            return Verified(content, self._spool.keep(incoming, content), manifest)
        except BaseException:
            self._spool.discard(incoming)
            raise

    def _release_unwanted(self, checking: "asyncio.Future[Verified]") -> None:
        """The caller was cancelled while its version was checked: nobody else releases the copy."""
        if not checking.cancelled() and checking.exception() is None:
            self._spool.release(checking.result().content)

    def close(self) -> None:
        """Take no further work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _in_child(self, root: Path, folder: Path, incoming: Path) -> str:
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (sender, root, folder, incoming, self._backbone, self._limits, self._cores)
        process = self._context.Process(target=run_check, args=arguments, name="mtlora-verify", daemon=True)
        process.start()
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
            process.join()
            receiver.close()
        if not passed:
            raise StageError(Stage.VERIFIED, text)
        return str(text)


def _death(exit_code: int | None, limits: VerificationLimits) -> str:
    if exit_code == -signal.SIGXCPU:
        return f"reading it took more than {limits.timeout_s:g} s of a core"
    return f"reading it ended the process that read it (exit status {exit_code})"
