"""Logs: one JSON object per line on stderr, formatted and written by a thread.

A slow reader of stderr (a disk or a container runtime) must not delay requests. So lines wait in memory up to a limit;
further lines are dropped and counted.
"""

import contextlib
import json
import logging
import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

_PREFIX = "mtlora.server"
MAX_WAITING = 10_000
# Seconds that a line waits for others.
_GATHER_S = 0.2
# Seconds that the shutdown waits for the last lines to be written.
_FINISH_S = 2.0
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


class JsonFormatter(logging.Formatter):
    """`extra={"fields": {...}}` become members of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _to_json(line)


class _Waiting(logging.Handler):
    """Queue of records for the writing thread; counts records dropped because the queue is full.

    The thread wakes up once for several lines, because each wake-up takes the interpreter from the event loop. A
    warning is written without this wait.
    """

    def __init__(self, writes: "logging.StreamHandler[TextIO]", most: int) -> None:
        super().__init__()
        self._writes = writes
        self._most = most
        self._lines: deque[logging.LogRecord] = deque()
        self._left_out = 0
        self._some, self._urgent, self._ending = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= self._most:
            self._left_out += 1
            return
        if self._left_out:
            self._lines.append(_notice(self._left_out))
            self._left_out = 0
        self._lines.append(record)
        if not self._some.is_set():
            self._some.set()
        if record.levelno >= logging.WARNING:
            self._urgent.set()

    def finish(self) -> bool:
        """Wait for the lines to be written, two seconds at most, and end the thread. False if stderr is stuck."""
        self._ending = True
        self._urgent.set()
        self._some.set()
        self._thread.join(_FINISH_S)
        if self._thread.is_alive():
            return False
        if self._left_out:
            self._writes.handle(_notice(self._left_out))
        logging.getLogger(_PREFIX).handlers = [self._writes]
        return True

    def _write_lines(self) -> None:
        ended = False
        while not ended:
            self._some.wait()
            self._urgent.wait(_GATHER_S)
            self._urgent.clear()
            ended = self._ending
            # Clear the event before taking the lines, so that a line added meanwhile wakes this thread again.
            self._some.clear()
            lines = []
            while self._lines:
                record = self._lines.popleft()
                try:
                    lines.append(self._writes.format(record) + "\n")
                except Exception:
                    self._writes.handleError(record)
            # Ignore it: stderr is closed, so nobody reads it.
            with contextlib.suppress(OSError, ValueError):
                self._writes.stream.write("".join(lines))
                self._writes.flush()


def configure_logging(level: str) -> None:
    """Send this server's logs to stderr; call `finish_logging` before the end. Other loggers stay as they are."""
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(JsonFormatter())
    root = logging.getLogger(_PREFIX)
    root.handlers = [_Waiting(stderr, MAX_WAITING)]
    root.propagate = False
    root.setLevel(level.upper())


def set_level(level: str) -> None:
    """Log lines of this level and more severe ones from now on."""
    logging.getLogger(_PREFIX).setLevel(level.upper())
    get_logger("logs").warning("log level changed", extra={"fields": {"log_level": level}})


def finish_logging() -> bool:
    """Write the lines that still wait, for two seconds at most; later lines are written at once.

    False if nobody reads stderr. Writing to it would then block, even in the interpreter's exit.
    """
    return all(each.finish() for each in logging.getLogger(_PREFIX).handlers if isinstance(each, _Waiting))


def get_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(f"{_PREFIX}.{name}")
    # Do not look up the caller: walking the stack would take a fifth of a line's time.
    logger.findCaller = lambda *_, **__: ("", 0, "", None)  # type: ignore[method-assign]
    return logger


def _notice(lines: int) -> logging.LogRecord:
    extra = {"fields": {"lines": lines}}
    return get_logger("logs").makeRecord(
        f"{_PREFIX}.logs", logging.WARNING, __file__, 0, "lines left out: stderr is not read fast enough", (), None,
        extra=extra,
    )  # fmt: skip
