"""A worker with a child process, for tests of workers."""

import subprocess
import sys
from typing import Any

from benchmarks.harness.worker import Handle, WorkerProcess, serve


def start(settings: dict[str, Any]) -> Handle:
    """Start the child. Replies carry its pid; a message with "fail" raises."""
    print("started with", settings)
    child = subprocess.Popen(["sleep", "600"])

    def handle(message: dict[str, Any]) -> dict[str, Any]:
        print("asked", message)
        if "fail" in message:
            raise ValueError(message["fail"])
        return {"child": child.pid, "asked": message, "settings": settings}

    return handle


def main() -> None:
    """With settings, be the worker. Without, start one, print its child's pid and wait."""
    if len(sys.argv) > 1:
        serve(start)
        return
    with WorkerProcess(__spec__.name, {}) as worker:
        print(worker.ask({})["child"], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
