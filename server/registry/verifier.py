"""Checks a version in a process of its own, under limits, so that no file can hurt the server by being looked at.

A server process of multiprocessing's, with the checkpoint reader imported, forks one child a version. The child copies
the two files to the spool, never more than allowed, and reads the copy as the engine will. The parent reads nothing
that a child has not passed.
"""

import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.registry.source import MANIFEST_FILE, TENSORS_FILE, Found
from server.registry.spool import Spool
from server.registry.version import Stage, StageError

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.checkpoint.format import AdapterManifest

_AT_ONCE = 2
_CHUNK = 1 << 20
# A server holds a row of the table for each.
MAX_TASKS = 20_000


@dataclass(frozen=True)
class VerificationLimits:
    """What one verification may take: bytes of both files, and seconds, of the clock and of a core.

    headroom_bytes: memory for reading, beside the tensors and what is made of them.
    """

    max_bytes: int = 1 << 30
    timeout_s: float = 60.0
    headroom_bytes: int = 512 << 20

    @property
    def memory_bytes(self) -> int:
        """Address space, above what the child begins with."""
        return 2 * self.max_bytes + self.headroom_bytes


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
        self._context.set_forkserver_preload(["mtlora.checkpoint.read"])
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
        process = self._context.Process(target=_child, args=arguments, name="mtlora-verify", daemon=True)
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


def _child(
    sender: Connection,
    root: Path,
    folder: Path,
    incoming: Path,
    backbone: "BackboneArchitecture",
    limits: VerificationLimits,
    cores: set[int],
) -> None:
    """In the child: send (True, content) or (False, reason)."""
    # The process it was forked from may be bound to one. Of those there were, some may have been taken away since.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)
    _limit_this_process(limits)
    answer: tuple[bool, Any]
    try:
        answer = True, check(root, folder, incoming, backbone, limits.max_bytes)
    except MemoryError:
        answer = False, f"{folder}: reading it takes more than {limits.memory_bytes >> 20} MiB of memory"
    except Exception as error:
        answer = False, str(error) or f"{folder}: {type(error).__name__}"
    sender.send(answer)
    sender.close()


def check(root: Path, folder: Path, incoming: Path, backbone: "BackboneArchitecture", max_bytes: int) -> str:
    """Copy a version to `incoming` and read it there; its content's hash. Raises CheckpointError.

    The copy's manifest is without provenance, which may be any JSON: whoever reads it later reads only what serves.
    """
    from mtlora.checkpoint.format import CheckpointError
    from mtlora.checkpoint.read import MAX_MANIFEST_BYTES, read_checkpoint
    from mtlora.checkpoint.untrusted import open_file

    real = folder.resolve()
    if not real.is_relative_to(root.resolve()):
        raise CheckpointError(f"{folder}: expected a folder inside {root}, found a link to {real}")
    left = max_bytes
    for name in (MANIFEST_FILE, TENSORS_FILE):
        with open_file(folder, name) as source, (incoming / name).open("xb") as copy:
            # The size first: a sparse file claims any size and costs nothing.
            size = os.fstat(source.fileno()).st_size
            if name == MANIFEST_FILE and size > MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{folder / name}: {size} bytes, allowed are {MAX_MANIFEST_BYTES}")
            left -= size
            if left < 0:
                raise CheckpointError(f"{folder}: expected at most {max_bytes} bytes in all, found {max_bytes - left}")
            # Not past that size, should it grow meanwhile: the limit on file sizes ends what goes on and on.
            shutil.copyfileobj(source, copy, _CHUNK)
    try:
        manifest = read_checkpoint(incoming, backbone).manifest
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(incoming), str(folder))) from None
    if len(manifest.tasks) > MAX_TASKS:
        raise CheckpointError(f"{folder}: tasks: expected at most {MAX_TASKS}, found {len(manifest.tasks)}")
    content = hashlib.sha256((incoming / MANIFEST_FILE).read_bytes()).hexdigest()
    serving = manifest.model_copy(update={"training": {}, "evaluation": {}})
    (incoming / MANIFEST_FILE).write_text(serving.model_dump_json())
    return content


def _limit_this_process(limits: VerificationLimits) -> None:
    import torch

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = pages * resource.getpagesize() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    seconds = max(1, int(limits.timeout_s))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.max_bytes + _CHUNK, limits.max_bytes + _CHUNK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Steps of the engine come first, which itself is nicer than this process's parent.
    os.nice(19)
