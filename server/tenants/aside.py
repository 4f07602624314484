"""Work on files and answers that others wrote, in a child process: it may take long, fail or be killed.

The server's event loop stands still while one of its threads holds the interpreter's lock, as parsers do.
"""

import contextlib
import multiprocessing
import os
import pickle
import resource
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MEMORY_BYTES = 2 << 30
_RESULT, _REFUSAL, _END = b"+", b"-", b"."


class AsideError(Exception):
    """The work failed; the message says why."""


def in_child(work: Callable[..., Iterable[Any]], *arguments: Any, timeout_s: float) -> list[bytes]:
    """What `work(*arguments)` yields, each pickled. Blocks for `timeout_s` seconds at most. Raises AsideError."""
    context = multiprocessing.get_context("forkserver")
    until = time.monotonic() + timeout_s
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, timeout_s, work, arguments), daemon=True)
    try:
        process.start()
    except (OSError, EOFError) as error:
        receiver.close()
        raise AsideError(f"no process for it: {error}") from None
    finally:
        sender.close()
    results: list[bytes] = []
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            message = receiver.recv_bytes()
            kind, content = message[:1], message[1:]
            if kind == _END:
                return results
            if kind == _REFUSAL:
                raise AsideError(content.decode())
            results.append(content)
        raise AsideError(f"not done within {timeout_s:g} s")
    except EOFError:
        process.join(5)
        raise AsideError(f"the process that read it ended with exit status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(sender: Connection, timeout_s: float, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    # Requests come first.
    os.nice(5)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = max(1, int(timeout_s))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The server may have given up on it.
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in work(*arguments):
                sender.send_bytes(_RESULT + pickle.dumps(result))
            sender.send_bytes(_END)
        except Exception as error:
            sender.send_bytes(_REFUSAL + (str(error) or type(error).__name__).encode(errors="replace"))
