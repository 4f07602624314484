"""An engine's processes end when they are killed, with the shared memory they leave, and when their server has gone."""

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from server.engine import Engine, orphans
from server.engine.processes import EngineProcesses
from server.settings import Settings

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


def test_kill_ends_every_process_and_frees_shared_memory() -> None:
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
        # The child is an orphan when `kill` is called.
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


def test_a_lost_engine_is_shut_down_once_its_processes_have_ended(tmp_path: Path) -> None:
    """vLLM's shutdown fails where a process ends while it looks for that process's children."""
    core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    running: list[bool] = []
    engine = Engine(Settings(adapters=tmp_path), tmp_path, lambda _: None)
    engine._processes = EngineProcesses.below([core.pid])
    process = psutil.Process(core.pid)
    engine._llm = SimpleNamespace(shutdown=lambda timeout: running.append(process.is_running()))
    engine._lost = True
    engine._processes.kill()
    engine.shutdown()
    assert running == [False]


# A server that starts an engine's process as vLLM does; vLLM calls its plugins there.
_SERVER = """
import multiprocessing, os, time

def engine():
    from server.engine import Engine, orphans
    orphans.register()
    orphans.register()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=engine)
    process.start()
    process.join()
"""


@pytest.mark.parametrize(("switch", "ends"), [("1", True), ("0", False)])
def test_engine_ends_with_the_server_that_started_it(tmp_path: Path, switch: str, ends: bool) -> None:
    (tmp_path / "server_of_engine.py").write_text(_SERVER)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), orphans.ENVIRONMENT_SWITCH: switch}
    server = subprocess.Popen(
        [sys.executable, str(tmp_path / "server_of_engine.py")],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    try:
        server.kill()
        server.wait()
        gone, _ = psutil.wait_procs([engine], timeout=10 if ends else 0.5)
        assert bool(gone) is ends
    finally:
        if engine.is_running():
            engine.kill()
