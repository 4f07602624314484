"""Killing an engine's processes: all of them, also a stopped one, with the shared memory they leave."""

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

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


def test_they_yield_their_cores_with_every_thread() -> None:
    threads = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); print(flush=True)"
    parent = subprocess.Popen([sys.executable, "-c", threads], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        parent.stdout.readline()
        own = os.getpriority(os.PRIO_PROCESS, 0)
        EngineProcesses.below([parent.pid]).yield_cores(3)
        found = {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(parent.pid).threads()}
        assert found == {min(own + 3, 19)}
        assert os.getpriority(os.PRIO_PROCESS, 0) == own
        EngineProcesses.below([parent.pid]).yield_cores(99)
        assert psutil.Process(parent.pid).nice() == 19
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each")
def test_nothing_else_runs_where_a_rank_begins_its_steps() -> None:
    given = os.sched_getaffinity(0)
    first = min(given)
    # A rank's first thread, bound to a core, one that inherits that, and one of the team, bound to another.
    script = f"""
import os, threading, time
given = os.sched_getaffinity(0)
ready = threading.Event()
def bound():
    os.sched_setaffinity(0, {{max(given)}})
    ready.set()
    time.sleep(600)
os.sched_setaffinity(0, {{{first}}})
threads = [threading.Thread(target=target, args=args) for target, args in [(time.sleep, (600,)), (bound, ())]]
for thread in threads: thread.start()
ready.wait()
print(*(thread.native_id for thread in threads), flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    engine = EngineProcesses()
    try:
        assert parent.stdout is not None
        inheriting, bound = map(int, parent.stdout.readline().split())
        engine = EngineProcesses.below([parent.pid])
        engine.part_cores()
        others = given - {first}
        assert os.sched_getaffinity(parent.pid) == {first}
        assert os.sched_getaffinity(inheriting) == others
        assert os.sched_getaffinity(bound) == {max(given)}
        assert os.sched_getaffinity(0) == others
        engine.rejoin_cores()
        assert os.sched_getaffinity(0) == given
    finally:
        engine.rejoin_cores()
        parent.kill()
        parent.wait()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each")
def test_ranks_that_are_not_bound_leave_every_core_to_all() -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    given = os.sched_getaffinity(0)
    try:
        EngineProcesses.below([parent.pid]).part_cores()
        assert os.sched_getaffinity(0) == os.sched_getaffinity(parent.pid) == given
    finally:
        parent.kill()
        parent.wait()
