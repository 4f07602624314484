"""What a running test looks like: a table that renews itself on a terminal, elsewhere a line every few seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loadtest.processes import Seen

_LINE_EVERY_S = 5.0


class View:
    """Shows phases, one at a time, and lines that stay."""

    def __init__(self, *, live: bool = True) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._live_wanted = live and self._console.is_terminal
        self._live: Live | None = None
        self._name = ""
        self._began = 0.0
        self._last_line = 0.0
        self._previous: tuple[float, int] = (0.0, 0)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While a phase runs."""
        self._name, self._began = name, time.monotonic()
        self._last_line = self._began
        self._previous = (self._began, 0)
        if not self._live_wanted:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def progress(self, seen: Seen) -> None:
        """How far the phase is."""
        now = time.monotonic()
        if self._live is not None:
            if now - self._previous[0] >= 1.0:
                self._live.update(self._table(seen, now), refresh=True)
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            rate = self._rate(seen, now)
            self.line(
                f"  {self._name}: {now - self._began:.0f} s, sent {seen.sent}, answered {seen.ok} ({rate:.1f}/s), "
                f"failed {seen.failed}, in flight {seen.in_flight}{_latencies(seen)}"
            )

    def asking_again(self, done: int, whole: int) -> None:
        """How far the check is."""
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self.line(f"  check: {done} of {whole} inputs asked again alone")

    def _rate(self, seen: Seen, now: float) -> float:
        then, ok = self._previous
        self._previous = (now, seen.ok)
        return (seen.ok - ok) / (now - then) if now > then else 0.0

    def _table(self, seen: Seen, now: float) -> Table:
        table = Table(title=Text(f"{self._name}, {now - self._began:.0f} s"), title_justify="left", min_width=60)
        for name in ("sent", "answered", "answers/s", "failed", "in flight"):
            table.add_column(name, justify="right")
        cells: list[Any] = [seen.sent, seen.ok, f"{self._rate(seen, now):.1f}", seen.failed, seen.in_flight]
        table.add_row(*map(str, cells))
        if latencies := _latencies(seen):
            table.caption = latencies.removeprefix(", ")
        return table


def _latencies(seen: Seen) -> str:
    """Known where this process records by itself."""
    if seen.recorder is None or not seen.ok:
        return ""
    group = seen.recorder.everything
    return (
        f", TTFT p50 {group.ttft.quantile(0.5):.2f} s p95 {group.ttft.quantile(0.95):.2f} s"
        f", E2E p50 {group.e2e.quantile(0.5):.2f} s p95 {group.e2e.quantile(0.95):.2f} s"
    )
