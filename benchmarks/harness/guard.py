"""Ends a process when its parent ends, even if SIGTERM or SIGKILL ends the parent before it can clean up.

A guard is a process of its own. It waits until either of the two ends, then kills the process group of the started one.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def guarded(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> Iterator[None]:
    """Guard a process that leads its process group, and everything that it starts there."""
    ends = [os.pidfd_open(pid) for pid in (os.getpid(), process.pid)]
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(process.pid), *map(str, ends)],
            pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    finally:
        for end in ends:
            os.close(end)
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


@contextlib.contextmanager
def guarded_process(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a process with `options` of Popen, guarded; kill it and everything that it starts at the end."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    with guarded(process):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    """Kill the process group once one of the two processes ends. Arguments: the group, and a pidfd of each process."""
    group, *ends = map(int, sys.argv[1:])
    select.select(ends, [], [])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
