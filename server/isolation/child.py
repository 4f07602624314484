"""Runs a function in a child process under limits.

A child is needed because parsers hold the interpreter's lock, which would stop the server's event loop. The fork
server of multiprocessing imports what the work needs once, and forks a child for each call.
"""

import contextlib
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from server.isolation.limits import Limits

_CONTEXT = multiprocessing.get_context("forkserver")
# Import these in the fork server; otherwise every child would import them again.
_CONTEXT.set_forkserver_preload(
    ["mtlora.checkpoint.read", "server.registry.check", "server.tenants.file", "server.tenants.jwks"]
)
# Seconds to wait for a killed process: one that waits for storage does not end before the kernel's wait does.
_KILL_S = 5.0
_RESULT, _REFUSAL, _NO_MEMORY, _END = b"+", b"-", b"m", b"."


class ChildError(Exception):
    """The work failed; the message says why."""


class ChildEndedError(ChildError):
    """The child exceeded a limit or ended without a result."""


def in_child(
    work: Callable[..., Iterable[Any]], *arguments: Any, limits: Limits, running: set[BaseProcess] | None = None
) -> list[bytes]:
    """Run `work(*arguments)` in a child and yield each pickled result. Blocks. Raises ChildError.

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
        raise ChildEndedError(f"cannot start a child process: {error}") from None
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
                raise ChildEndedError(limits.too_much_memory)
            results.append(content)
        raise ChildEndedError(limits.too_long)
    except EOFError:
        process.join(_KILL_S)
        raise ChildEndedError(limits.death(process.exitcode)) from None
    finally:
        process.kill()
        process.join(_KILL_S)
        running.discard(process)
        receiver.close()


def _run(sender: Connection, limits: Limits, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    limits.apply()
    # The server has stopped waiting and closed the pipe.
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in work(*arguments):
                sender.send_bytes(_RESULT + pickle.dumps(result))
            sender.send_bytes(_END)
        except MemoryError:
            sender.send_bytes(_NO_MEMORY)
        except Exception as error:
            sender.send_bytes(_REFUSAL + (str(error) or type(error).__name__).encode(errors="replace"))
