"""Counts usage by tenant and task, exactly even after a restart or kill, and enforces budgets.

`record` writes a call to the journal before the call's status is sent, so every answered call is counted. A thread sums
up the journal every second, or every ten seconds if usage is kept in memory. Usage of the current day and month is also
in memory, for budgets.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from mtlora.files import lock_for_this_process
from server.accounting.journal import Journal, Record, UsageCounts
from server.accounting.totals import DAY_S, HOUR_S, Row, Totals, periods
from server.errors import quota_exceeded, unavailable
from server.telemetry.logs import get_logger
from server.telemetry.metrics import Metrics
from server.tenants import Tenant

logger = get_logger("usage")

_SUM_UP_S = 1.0
# Without a folder, usage is lost with the process anyway, so sum up rarely.
_SUM_UP_IN_MEMORY_S = 10.0
# Seconds that the shutdown waits for the last sums; if they take longer, the next start makes them.
_FINISH_S = 5.0


class UsageError(RuntimeError):
    """Usage cannot be kept in this folder; the message says why."""


class Usage:
    """All methods but the constructor run on the event loop. `clock` gives seconds since 1970.

    folder: where usage is kept; None: in memory, until the process ends. Raises UsageError.
    """

    def __init__(self, folder: Path | None, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._metrics = metrics
        self._clock = clock
        # The database's own thread.
        self._thread = ThreadPoolExecutor(1, "usage")
        self._closed = False
        # Whether too many records wait for the disk.
        self.stuck = False
        try:
            if folder:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                # The lock file; open until this process ends.
                self._lock = _lock(folder)
            self._totals = self._thread.submit(Totals, folder, int(clock())).result()
            self._journal = Journal(folder, self._thread.submit(lambda: self._totals.place[0] + 1).result())
            self._thread.submit(self._totals.sum_up, self._journal).result()
            self._spent = self._thread.submit(self._totals.spent, periods(int(clock()) - 31 * DAY_S)[1]).result()
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"usage_dir: {folder}: {error}") from None
        self._hour, self._periods = -1, ("", "")
        # Whether the journal has new records since the last sums.
        self._grown = False

    @property
    def durable(self) -> bool:
        """Whether usage outlives this process."""
        return self._folder is not None

    def record(self, tenant: str, task: str, counts: UsageCounts) -> None:
        """Count a finished call. After it returns, the record survives a kill of the process.

        If the disk refuses the write, the record waits in memory; `check` refuses calls once too many records wait.
        """
        at = int(self._clock())
        for period in self._periods_of(at):
            spent = self._spent.get((tenant, period))
            if spent is None:
                spent = self._spent[tenant, period] = UsageCounts()
            spent.add(counts)
        self._append(Record(at, tenant, task, counts).line())
        self._grown = True

    def check(self, tenant: Tenant, requests: int = 1) -> None:
        """Raise RESOURCE_EXHAUSTED if a budget of the tenant has no room, UNAVAILABLE if usage cannot be recorded.

        Running calls may exceed a budget, because a call counts at its end.
        """
        if self.stuck:
            raise unavailable("the server cannot record usage", 10.0)
        now = int(self._clock())
        for period, name in zip(self._periods_of(now), ("daily", "monthly"), strict=True):
            spent = self._spent.get((tenant.id, period))
            for what in ("requests", "tokens"):
                budget = getattr(tenant, f"{name}_{what}")
                more = requests if what == "requests" else 1
                if budget is not None and (getattr(spent, what) if spent else 0) + more > budget:
                    quota = f"{name}_{what}"
                    self._metrics.record_quota_refusal(tenant.id, quota)
                    raise quota_exceeded(f"tenant:{tenant.id}", f"{budget} {quota}", _next(period) - now)

    async def read(
        self, since: int, until: int, granularity: str, tenant: str | None = None, task: str | None = None
    ) -> AsyncGenerator[list[Row], None]:
        """Sums by period, tenant and task, every recorded call included, in pages. See `Totals.read`."""
        await self._in_thread(self._totals.sum_up, self._journal)
        pages = self._totals.read(since, until, granularity, tenant, task)
        try:
            while page := await self._in_thread(next, pages, None):
                yield page
        finally:
            await self._in_thread(pages.close)

    async def counted_since(self) -> int:
        """The time, in seconds since 1970, from which usage is complete."""
        return int(await self._in_thread(lambda: self._totals.since))

    async def run(self) -> None:
        """Sum up the journal's new records once a second, until cancelled."""
        folded = 0
        while True:
            await asyncio.sleep(_SUM_UP_S if self.durable else _SUM_UP_IN_MEMORY_S)
            if self._journal.unwritten:
                self._append(b"")
            hour = int(self._clock()) // HOUR_S
            if not self._grown and hour == folded:
                continue
            try:
                self._grown = False
                await self._in_thread(self._totals.sum_up, self._journal)
                if hour != folded:
                    folded = hour
                    self._forget_periods()
                    await self._in_thread(self._totals.fold, int(self._clock()))
            except (OSError, sqlite3.Error) as error:
                # The records are still in the journal; the next round tries again.
                self._grown = True
                self._metrics.record_accounting_failure("usage")
                logger.error("usage not added up yet; trying again", extra={"fields": {"reason": str(error)}})

    def close(self) -> None:
        """Sum up the rest within a few seconds. The next start sums up later records. The folder stays locked."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError, OSError, sqlite3.Error):
            self._thread.submit(self._finish).result(_FINISH_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _finish(self) -> None:
        self._totals.sum_up(self._journal)
        self._totals.close()

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _append(self, line: bytes) -> None:
        try:
            self._journal.append(line)
        except OSError as error:
            self._metrics.record_accounting_failure("usage")
            logger.error("usage cannot be written yet; it waits in memory", extra={"fields": {"reason": str(error)}})
        self.stuck = self._journal.full

    def _periods_of(self, at: int) -> tuple[str, str]:
        """Start new counts when the day or month changes. Keeps old ones for a clock that is set back."""
        hour = at // HOUR_S
        if hour != self._hour:
            self._hour, self._periods = hour, periods(at)
        return self._periods

    def _forget_periods(self) -> None:
        # Keep one more month and day than needed, for a clock that is set back.
        oldest = periods(int(self._clock()) - 31 * DAY_S)
        kept = {7: oldest[1], 10: periods(int(self._clock()) - DAY_S)[0]}
        self._spent = {key: counts for key, counts in self._spent.items() if key[1] >= kept[len(key[1])]}


def _lock(folder: Path) -> IO[str]:
    """Lock the folder until this process ends. Raises UsageError; OSError if files cannot be locked."""
    try:
        return lock_for_this_process(folder / "lock")
    except BlockingIOError as error:
        raise UsageError(
            f"usage_dir: {folder} is in use by another server ({error.strerror}); allowed: a folder of its own for "
            "every server"
        ) from None


def _next(period: str) -> int:
    """When a day or a month ends, in seconds since 1970."""
    if len(period) == 10:
        return int((datetime.fromisoformat(period).replace(tzinfo=UTC) + timedelta(days=1)).timestamp())
    first = datetime.fromisoformat(f"{period}-01").replace(tzinfo=UTC)
    return int((first + timedelta(days=32)).replace(day=1).timestamp())
