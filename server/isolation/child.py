"""Runs a function in a child process under limits.

The server's event loop stands still while one of its threads holds the interpreter's lock, as parsers do. The fork
server of multiprocessing imports what the work needs once, and forks a child for each call.
"""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# Import these once; every child would import them again.
_CONTEXT.set_forkserver_preload(
    ["mtlora.checkpoint.read", "server.registry.check", "server.tenants.file", "server.tenants.jwks"]
)
# A process that waits for storage may outlive its end for as long as the kernel waits.
_KILL_S = 5.0
_RESULT, _REFUSAL, _NO_MEMORY, _END = b"+", b"-", b"m", b"."


@dataclass(frozen=True)
class Limits:
    """Limits of a child.

    timeout_s: seconds, both of the clock and of one core. memory_bytes: address space that it may add to what it starts
    with. file_bytes: the size of a file that it writes. niceness: by how much others come first.
    """

    timeout_s: float
    memory_bytes: int = 2 << 30
    file_bytes: int = resource.RLIM_INFINITY
    niceness: int = 5

    def apply(self) -> None:
        """Limit this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + self.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        seconds = max(1, int(self.timeout_s))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(self.niceness)


class ChildError(Exception):
    """The work failed; the message says why."""


class ChildEndedError(ChildError):
    """The work exceeded a limit, or ended its process."""


def in_child(
    work: Callable[..., Iterable[Any]], *arguments: Any, limits: Limits, running: set[BaseProcess] | None = None
) -> list[bytes]:
    """What `work(*arguments)` yields, each pickled. Blocks. Raises ChildError.

    running: holds the process while it runs, so that a caller can end it.
    """
    running = set() if running is None else running
    until = time.monotonic() + limits.timeout_s
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(sender, limits, work, arguments), daemon=True)
    try:
        process.start()
    except (OSError, EOFError) as error:
        receiver.close()
        raise ChildEndedError(f"no process for it: {error}") from None
    finally:
        sender.close()
    running.add(process)
    results: list[bytes] = []
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            message = receiver.recv_bytes()
            kind, content = message[:1], message[1:]
            if kind == _END:
                return results
            if kind == _REFUSAL:
                raise ChildError(content.decode())
            if kind == _NO_MEMORY:
                raise ChildEndedError(f"takes more than {limits.memory_bytes >> 20} MiB of memory")
            results.append(content)
        raise ChildEndedError(f"not done within {limits.timeout_s:g} s")
    except EOFError:
        process.join(_KILL_S)
        raise ChildEndedError(_death(process.exitcode, limits)) from None
    finally:
        process.kill()
        process.join(_KILL_S)
        running.discard(process)
        receiver.close()


def _run(sender: Connection, limits: Limits, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    limits.apply()
    # The server closes the pipe when it stops waiting.
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in work(*arguments):
                sender.send_bytes(_RESULT + pickle.dumps(result))
            sender.send_bytes(_END)
        except MemoryError:
            sender.send_bytes(_NO_MEMORY)
        except Exception as error:
            sender.send_bytes(_REFUSAL + (str(error) or type(error).__name__).encode(errors="replace"))


def _death(exit_code: int | None, limits: Limits) -> str:
    if exit_code == -signal.SIGXCPU:
        return f"takes more than {limits.timeout_s:g} s of a core"
    return f"ended the process that read it (exit status {exit_code})"
