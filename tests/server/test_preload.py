"""Engines are forked from a process that has made their imports, where it has what they need, and spawned elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server.cli.process import ServerProcess
from server.engine import preload

SCRIPT = """
import multiprocessing, os
from server.engine import preload

def show():
    print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("OTHER"), os.environ.get("GONE"), flush=True)

if __name__ == "__main__":
    server = preload._ForkServer()
    assert server.differs() is None
    os.environ |= {"OMP_NUM_THREADS": "3", "GONE": "1"}
    server.start("json")
    assert server.differs() == []
    os.environ["OTHER"] = "2"
    del os.environ["GONE"]
    assert server.differs() == []
    os.environ["OMP_NUM_THREADS"] = "7"
    assert server.differs() == ["OMP_NUM_THREADS"]
    os.environ["OMP_NUM_THREADS"] = "3"
    process = preload._ForkContext().Process(target=show)
    process.start()
    process.join()
    os.kill(server._pid, 9)
    os.waitid(os.P_PID, server._pid, os.WEXITED | os.WNOWAIT)
    process = multiprocessing.get_context("forkserver").Process(target=show)
    process.start()
    process.join()
    assert server.differs() is None
"""


def test_a_fork_server_is_known_by_what_its_libraries_have_read(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # The process has its starter's environment, not the fork server's.
    assert done.stdout.splitlines()[0] == "3 2 None"


@pytest.mark.parametrize(
    ("bind", "threads"),
    [
        ("0,1", {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": "0 1"}),
        ("5,2-4", {"OMP_NUM_THREADS": "4", "GOMP_CPU_AFFINITY": "5 2 3 4"}),
        ("nobind", {}),
    ],
)
def test_what_the_libraries_will_read(bind: str, threads: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    found = preload.environment_of_libraries({preload.BIND: bind})
    library = Path(found.pop("LD_PRELOAD"))
    assert library.name.startswith("libgomp")
    assert library.exists()
    assert found == threads


def test_libraries_that_are_preloaded_already(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = {preload.BIND: "0"}
    for already in ("/lib/libgomp.so.1", "/lib/libtcmalloc.so:/lib/libgomp.so.1"):
        monkeypatch.setenv("LD_PRELOAD", already)
        assert preload.environment_of_libraries(bind)["LD_PRELOAD"] == already
    monkeypatch.setenv("LD_PRELOAD", "/lib/libtcmalloc.so")
    first, second = preload.environment_of_libraries(bind)["LD_PRELOAD"].split(":")
    assert first == "/lib/libtcmalloc.so"
    assert "libgomp" in second
    # Its threads are told their cores in another way.
    monkeypatch.setenv("LD_PRELOAD", "/lib/libiomp5.so")
    assert preload.environment_of_libraries(bind) == {}


@pytest.mark.parametrize("bind", ["", "auto", "0|1", "all", "1-", "-1"])
def test_cores_that_are_not_known_in_advance(bind: str) -> None:
    assert preload.environment_of_libraries({preload.BIND: bind}) == {}


@pytest.mark.skipif(not preload._is_cpu_build(), reason="engines on GPUs are spawned")
def test_the_engine_of_a_server_is_forked(server: ServerProcess) -> None:
    """So vLLM wants what was foreseen; and the process it was forked from has no thread that could be lost."""
    engine = next(
        each for each in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in each.name()
    )
    parent = engine.parent()
    assert parent is not None
    assert parent.ppid() == server.process.pid
    assert parent.num_threads() == 1
