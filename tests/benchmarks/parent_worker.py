"""A worker that has a child of its own, for the tests of workers: `python -m tests.benchmarks.parent_worker`."""

import subprocess
import sys
from typing import Any

from benchmarks.harness.worker import Handle, WorkerProcess, serve


def start(settings: dict[str, Any]) -> Handle:
    """Replies with the child's number; fails where it is asked to."""
    print("started with", settings)
    child = subprocess.Popen(["sleep", "600"])

    def handle(message: dict[str, Any]) -> dict[str, Any]:
        print("asked", message)
        if "fail" in message:
            raise ValueError(message["fail"])
        return {"child": child.pid, "asked": message, "settings": settings}

    return handle


def main() -> None:
    """As a worker; with no settings, a process that starts one, tells its child's number and waits."""
    if len(sys.argv) > 1:
        serve(start)
        return
    with WorkerProcess(__spec__.name, {}) as worker:
        print(worker.ask({})["child"], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
