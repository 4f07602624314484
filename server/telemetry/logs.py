"""Logs: one JSON object a line on stderr, written by a thread.

Whoever reads stderr may be slow, a disk or a container runtime. What serves requests does not wait for it: lines that
wait for their turn are kept up to a number, and those beyond it are counted and left out.
"""

import json
import logging
import logging.handlers
import queue
import sys
import threading
import time
from typing import Any

_PREFIX = "mtlora.server"
MAX_WAITING = 10_000
# What the last lines get to be written in.
_FINISH_S = 2.0


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
        return json.dumps(line, ensure_ascii=False, default=str)


class _Writing(logging.handlers.QueueListener):
    """The thread that writes. Told to end, it ends when it has written what is before that."""

    def enqueue_sentinel(self) -> None:
        # The base class gives up on a full queue.
        self.queue.put(self._sentinel)  # type: ignore[attr-defined]


class _Waiting(logging.handlers.QueueHandler):
    """Hands records to the thread that writes them. Of those left out, because too many wait, it says how many."""

    def __init__(self, writes: logging.Handler, most: int) -> None:
        self._lines: queue.Queue[Any] = queue.Queue(most)
        super().__init__(self._lines)
        self._writes = writes
        self._listener = _Writing(self._lines, writes)
        self._listener.start()
        self._finishing = threading.Thread(target=self._listener.stop, daemon=True)
        self._left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The thread that writes is of this process: it formats.
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._left_out:
                self._lines.put_nowait(_notice(self._left_out))
                self._left_out = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._left_out += 1

    def finish(self) -> bool:
        """Have what waits written, for a while at most, and end the thread. False where a stream held it up."""
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
    """Send this server's logs to stderr. Other libraries' loggers are left alone. `finish_logging` before the end."""
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(JsonFormatter())
    root = logging.getLogger(_PREFIX)
    root.handlers = [_Waiting(stderr, most_waiting)]
    root.propagate = False
    root.setLevel(level.upper())


def finish_logging() -> bool:
    """Write the lines that still wait, for two seconds at most; later ones are written at once.

    False where nobody reads stderr: whoever writes there now waits as well, the interpreter on its way out included.
    """
    return all(each.finish() for each in logging.getLogger(_PREFIX).handlers if isinstance(each, _Waiting))


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(f"{_PREFIX}.{name}")


def _notice(lines: int) -> logging.LogRecord:
    extra = {"fields": {"lines": lines}}
    return get_logger("logs").makeRecord(
        f"{_PREFIX}.logs", logging.WARNING, __file__, 0, "lines left out: stderr is not read fast enough", (), None,
        extra=extra,
    )  # fmt: skip
