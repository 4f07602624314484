"""How far a run is: a bar on a terminal, lines in a file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

# Lines in a file: one for each of so many equal parts of a run.
_LINES = 20


class Progress:
    """A context in which `step` tells each step. Silent: nothing is told."""

    def __init__(self, total: int, done: int, *, silent: bool, lines: bool) -> None:
        """lines: whether to write lines where stderr is no terminal."""
        self._total, self._done, self._first = total, done, done
        self._lines = lines and not silent and not sys.stderr.isatty()
        self._started = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=silent or None)

    def step(self, loss: float, speed: str) -> None:
        """Tell a step's loss and its speed."""
        self._done += 1
        self._bar.set_postfix_str(f"loss={loss:.3f}, {speed}")
        self._bar.update()
        if self._lines and self._done * _LINES // self._total > (self._done - 1) * _LINES // self._total:
            left = (time.monotonic() - self._started) / (self._done - self._first) * (self._total - self._done)
            told = f"train: step {self._done} of {self._total}, loss {loss:.3f}, {speed}, {_duration(left)} left"
            print(told, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
