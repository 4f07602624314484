"""Killing an engine's processes: all of them, also a stopped one, with the shared memory they leave."""

import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

from server.engine.processes import EngineProcesses

# A parent and its child, which maps shared memory of its own and some of this process's.
_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
child.wait()
"""
_CHILD = """
import sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
own = SharedMemory(create=True, size=4096)
resource_tracker.unregister(own._name, "shared_memory")
ours = SharedMemory(sys.argv[1])
resource_tracker.unregister(ours._name, "shared_memory")
print(own.name, flush=True)
time.sleep(600)
"""


def test_they_are_killed_and_leave_nothing() -> None:
    ours = SharedMemory(create=True, size=4096)
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, _CHILD, ours.name], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        left = Path("/dev/shm") / parent.stdout.readline().strip()
        processes = EngineProcesses.below([parent.pid])
        (child,) = psutil.Process(parent.pid).children()
        assert left in processes.shared
        assert left.exists()
        child.send_signal(signal.SIGSTOP)
        # Its child is an orphan when the rest is killed.
        parent.kill()
        parent.wait()
        processes.kill()
        processes.clean_up()
        assert not child.is_running()
        assert not left.exists()
        assert (Path("/dev/shm") / ours.name).exists()
    finally:
        parent.kill()
        ours.close()
        ours.unlink()
