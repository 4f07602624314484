"""Log lines are written by a thread, for which nothing else waits."""

import json
import subprocess
import sys
import threading

# Far more than a pipe holds, and than may wait.
LINES, WAITING = 5000, 100
SCRIPT = f"""
import sys
from server.logs import configure_logging, finish_logging, get_logger
configure_logging("info", most_waiting={WAITING})
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


def test_a_stderr_that_nobody_reads_holds_nothing_up() -> None:
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
