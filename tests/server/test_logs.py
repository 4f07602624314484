"""A thread writes log lines; nothing else waits for it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

# More lines than a pipe holds, and than may wait.
LINES, WAITING = 5000, 100
SCRIPT = f"""
import sys
from server.telemetry import logs
from server.telemetry.logs import configure_logging, finish_logging, get_logger
logs.MAX_WAITING = {WAITING}
configure_logging("info")
logger = get_logger("test")
for i in range({LINES}):
    logger.info("line %d", i, extra={{"fields": {{"padding": "x" * 1000}}}})
print("done", flush=True)
sys.stdin.readline()
try:
    1 / 0
except ZeroDivisionError:
    logger.error("the last one", exc_info=True)
finish_logging()
logger.info("after the end")
"""


def test_an_unread_stderr_holds_nothing_up() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    overdue = threading.Timer(60, process.kill)
    overdue.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        _, stderr = process.communicate("\n")
    finally:
        overdue.cancel()
        process.kill()
    assert process.returncode == 0, stderr[-2000:]
    assert [line for line in stderr.splitlines() if not line.startswith("{")] == []
    lines = [json.loads(line) for line in stderr.splitlines()]
    written = [line["message"] for line in lines]
    left_out = sum(line["lines"] for line in lines if line["logger"] == "mtlora.server.logs")
    own = [message for message in written if message.startswith("line ")]
    assert own == sorted(own, key=lambda message: int(message.split()[1]))
    last = [line for line in lines if line["message"] == "the last one"]
    assert len(own) + len(last) + left_out == LINES + 1
    assert left_out > LINES / 2
    assert all("ZeroDivisionError" in line["exception"] for line in last)
    assert written[-1] == "after the end"


@pytest.mark.slow
def test_a_server_ends_while_nobody_reads_its_log(tmp_path: Path) -> None:
    """The server cannot start and logs more than a pipe holds."""
    script = f"""
import sys
from server import app, cli
from server.app.app import _print_error
from server.telemetry import logs
logs._FINISH_S = 0.2
def serve(settings, ready):
    for i in range({LINES}):
        logs.get_logger("test").info("line %d " + "x" * 1000, i)
    _print_error(RuntimeError("it did not start"))
    return 3
app.serve = serve
sys.exit(cli.main(["serve", "--adapters", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert process.wait(60) == 3
    finally:
        process.kill()
        process.communicate()


def test_the_level_changes_while_running() -> None:
    script = """
from server.telemetry.logs import configure_logging, finish_logging, get_logger, set_level
configure_logging("warning")
logger = get_logger("test")
for level in ("warning", "debug", "warning"):
    set_level(level)
    logger.debug("at %s", level)
finish_logging()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines if line["logger"].endswith(".test")] == ["at debug"]
    assert [line["log_level"] for line in lines if "log_level" in line] == ["warning", "debug", "warning"]


def test_a_warning_brings_the_lines_before_it_at_once() -> None:
    script = """
import sys
from server.telemetry import logs
logs._GATHER_S = 3600.0
logs.configure_logging("info")
for say in (logs.get_logger("test").info, logs.get_logger("test").warning):
    say("said")
sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    overdue = threading.Timer(60, process.kill)
    overdue.start()
    try:
        assert process.stderr is not None
        assert [json.loads(process.stderr.readline())["level"] for _ in range(2)] == ["info", "warning"]
    finally:
        overdue.cancel()
        process.kill()
        process.communicate()
