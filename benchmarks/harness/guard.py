"""Processes that do not outlive the one that started them, however it ends: SIGTERM and SIGKILL run no cleanup there.

A guard is a process of its own. When either process ends, the guard kills the group that the started one leads.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def guarded(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> Iterator[None]:
    """Bind a process, started with `start_new_session=True`, and all that it starts to the life of this one."""
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


def main() -> None:
    """Wait for the first of two ends."""
    group, *ends = map(int, sys.argv[1:])
    select.select(ends, [], [])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
