"""Logs: one JSON object a line on stderr, formatted and written by a thread.

A slow reader of stderr, a disk or a container runtime, must not hold up requests. So lines wait in memory, up to a
number; lines beyond it are counted and left out.
"""

import json
import logging
import logging.handlers
import queue
import sys
import threading
import time
from functools import lru_cache
from typing import Any

_PREFIX = "mtlora.server"
MAX_WAITING = 10_000
# How long the end waits for the last lines to be written.
_FINISH_S = 2.0
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


class JsonFormatter(logging.Formatter):
    """`extra={"fields": {...}}` become members of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _to_json(line)


@lru_cache(1)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


class _Waiting(logging.handlers.QueueHandler):
    """Hands records to the thread that writes them, and counts those it leaves out because too many wait."""

    def __init__(self, writes: logging.Handler, most: int) -> None:
        # A SimpleQueue: a Queue's locks, in Python, cost three times as much a line.
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(self._lines)
        self._writes = writes
        self._most = most
        self._listener = logging.handlers.QueueListener(self._lines, writes)
        self._listener.start()
        self._finishing = threading.Thread(target=self._listener.stop, daemon=True)
        self._left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The base class formats here, for queues between processes.
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= self._most:
            self._left_out += 1
            return
        if self._left_out:
            self._lines.put(_notice(self._left_out))
            self._left_out = 0
        self._lines.put(record)

    def finish(self) -> bool:
        """Wait for the lines to be written, two seconds at most, and end the thread. False if stderr is stuck."""
        if not self._finishing.ident:
            self._finishing.start()
        self._finishing.join(_FINISH_S)
        if self._finishing.is_alive():
            return False
        if self._left_out:
            self._writes.handle(_notice(self._left_out))
        logging.getLogger(_PREFIX).handlers = [self._writes]
        return True


def configure_logging(level: str, most_waiting: int = MAX_WAITING) -> None:
    """Send this server's logs to stderr; call `finish_logging` before the end. Other loggers stay as they are."""
    # No line says which thread wrote it, nor the process's name.
    logging.logThreads = logging.logMultiprocessing = False
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(JsonFormatter())
    root = logging.getLogger(_PREFIX)
    root.handlers = [_Waiting(stderr, most_waiting)]
    root.propagate = False
    root.setLevel(level.upper())


def set_level(level: str) -> None:
    """Log lines of this level and more severe ones from now on."""
    logging.getLogger(_PREFIX).setLevel(level.upper())
    get_logger("logs").warning("log level changed", extra={"fields": {"log_level": level}})


def finish_logging() -> bool:
    """Write the lines that still wait, for two seconds at most; later lines are written at once.

    False if nobody reads stderr. Writing there would then block, in the interpreter's own exit too.
    """
    return all(each.finish() for each in logging.getLogger(_PREFIX).handlers if isinstance(each, _Waiting))


def get_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(f"{_PREFIX}.{name}")
    # Lines do not show where they were logged; walking the stack for it would cost a fifth of a line.
    logger.findCaller = lambda *_, **__: ("", 0, "", None)  # type: ignore[method-assign]
    return logger


def _notice(lines: int) -> logging.LogRecord:
    extra = {"fields": {"lines": lines}}
    return get_logger("logs").makeRecord(
        f"{_PREFIX}.logs", logging.WARNING, __file__, 0, "lines left out: stderr is not read fast enough", (), None,
        extra=extra,
    )  # fmt: skip
