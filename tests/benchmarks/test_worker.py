"""Workers: replies, failures, and that no process is left."""

import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest

from benchmarks.harness.waiting import wait_until
from benchmarks.harness.worker import WorkerFailedError, WorkerProcess

MODULE = "tests.benchmarks.parent_worker"


def wait_gone(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30)


def test_prints_of_a_worker_do_not_mix_with_its_replies() -> None:
    with WorkerProcess(MODULE, {"size": 3}) as worker:
        reply = worker.ask({"number": 1})
        assert reply["asked"] == {"number": 1}
        assert reply["settings"] == {"size": 3}
        assert worker.ask({"number": 2})["asked"] == {"number": 2}
    wait_gone(reply["child"])


def test_failed_worker_shows_its_log_and_leaves_no_child() -> None:
    with WorkerProcess(MODULE, {}) as worker:
        child = worker.ask({})["child"]
        with pytest.raises(WorkerFailedError, match=r"(?s)ended with status 1.*ValueError: no such case"):
            worker.ask({"fail": "no such case"})
        wait_gone(child)


def test_entering_fails_for_a_missing_module() -> None:
    with pytest.raises(WorkerFailedError, match=r"No module named tests\.benchmarks\.nothing"):
        WorkerProcess("tests.benchmarks.nothing", {}).__enter__()


@pytest.mark.parametrize("end", [psutil.Process.kill, psutil.Process.terminate], ids=["SIGKILL", "SIGTERM"])
def test_worker_and_its_children_end_with_the_process_that_started_it(end: Callable[[psutil.Process], None]) -> None:
    command = [sys.executable, "-m", MODULE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        started = psutil.Process(starter.pid).children(recursive=True)
        assert child in {process.pid for process in started}
        assert len(started) == 3  # the worker, its child and the guard
        end(psutil.Process(starter.pid))
    for process in started:
        wait_gone(process.pid)
