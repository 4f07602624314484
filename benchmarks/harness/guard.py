"""Runs a command that does not outlive the process that asks for it.

    python -m benchmarks.harness.guard PARENT COMMAND...

The guard leads a session of its own. When process PARENT or the command ends, in any way, the guard kills its process
group: the command, everything that the command has started, and itself. The command needs to know nothing of it.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence


def guarded(command: Sequence[str]) -> list[str]:
    """`command`, to be started with `start_new_session=True`, bound to the life of this process."""
    return [sys.executable, "-m", __spec__.name, str(os.getpid()), *command]


def main() -> None:
    """Start the command, wait for the first of two ends, kill the group."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    parent_end = os.pidfd_open(parent)
    # The number may have passed to another process by now.
    if os.getppid() != parent:
        return
    process = subprocess.Popen(command)
    command_end = os.pidfd_open(process.pid)
    ended, _, _ = select.select([parent_end, command_end], [], [])
    if command_end in ended:
        print(f"ended with status {process.wait()}", file=sys.stderr, flush=True)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
