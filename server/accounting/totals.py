"""Usage by hour, tenant and task, summed up from the journal in a database (SQLite) of the same folder.

One transaction adds records and stores the journal position reached, so each record counts exactly once, even if the
process is killed.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from server.accounting.journal import Journal, Record, UsageCounts, parse

HOUR_S, DAY_S = 3600, 86400
# Hours older than this are kept as days.
_HOURS_KEPT_S = 62 * DAY_S
# Most rows kept in memory, about 100 bytes each; above this, the oldest are dropped.
_MAX_ROWS_IN_MEMORY = 1_000_000
_PAGE_ROWS = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    hour INTEGER, tenant TEXT, task TEXT, requests INTEGER, prompt INTEGER, cached INTEGER, completion INTEGER,
    PRIMARY KEY (hour, tenant, task)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (
    tenant TEXT, period TEXT, requests INTEGER, tokens INTEGER, PRIMARY KEY (tenant, period)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journal (file INTEGER, offset INTEGER);
CREATE TABLE IF NOT EXISTS since (time INTEGER);
"""
_ADD_USAGE = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
    prompt = prompt + excluded.prompt, cached = cached + excluded.cached, completion = completion + excluded.completion
"""
_ADD_SPENT = """
INSERT INTO spent VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
    tokens = tokens + excluded.tokens
"""
_TO_DAYS = """
INSERT INTO usage SELECT hour / 86400 * 86400, tenant, task, sum(requests), sum(prompt), sum(cached), sum(completion)
    FROM usage WHERE hour < :until AND hour % 86400 GROUP BY 1, 2, 3
    ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
    prompt = prompt + excluded.prompt, cached = cached + excluded.cached, completion = completion + excluded.completion
"""
# SQL for the start of a row's period, by granularity.
PERIODS = {
    "hour": "hour",
    "day": "hour / 86400 * 86400",
    "month": "CAST(strftime('%s', hour, 'unixepoch', 'start of month') AS INTEGER)",
    "total": "0",
}

Row = tuple[int, str, str, UsageCounts]


def periods(at: int) -> tuple[str, str]:
    """The day and the month, in UTC, of seconds since 1970."""
    day = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
    return day, day[:7]


class Totals:
    """Sums in a folder's database, or in memory. Call all methods in one thread. Raises sqlite3.Error."""

    def __init__(self, folder: Path | None, now: int) -> None:
        self._in_memory = folder is None
        self._database = sqlite3.connect(
            folder / "usage.db" if folder else ":memory:", isolation_level=None, check_same_thread=False
        )
        # WAL: a backup that reads the file does not block the writer. FULL: a commit survives a power failure.
        self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _SCHEMA)
        if not self._database.execute("SELECT 1 FROM since").fetchone():
            with self._transaction():
                self._database.execute("INSERT INTO since VALUES (?)", (now,))
                self._database.execute("INSERT INTO journal VALUES (0, 0)")
        self._reads = 0

    def close(self) -> None:
        self._database.close()

    @property
    def place(self) -> tuple[int, int]:
        """The journal position, (file, offset), up to which records are summed up."""
        file, offset = self._database.execute("SELECT file, offset FROM journal").fetchone()
        return file, offset

    @property
    def since(self) -> int:
        """The time, in seconds since 1970, from which usage is complete."""
        return int(self._database.execute("SELECT time FROM since").fetchone()[0])

    def sum_up(self, journal: Journal) -> None:
        """Add the journal's new records, and remove files that are summed up."""
        summed, offset = self.place
        for number in journal.numbers:
            if number >= summed and (lines := journal.read(number, offset if number == summed else 0)):
                offset = len(lines) + (offset if number == summed else 0)
                summed = number
                self._add(parse(lines), (summed, offset))
        for number in journal.numbers:
            if number < summed:
                journal.remove(number)

    def spent(self, since: str) -> dict[tuple[str, str], UsageCounts]:
        """Tenants' usage by day and by month, for periods from `since` ("2026-11") on."""
        rows = self._database.execute("SELECT * FROM spent WHERE period >= ?", (since,))
        return {(tenant, period): UsageCounts(requests, tokens) for tenant, period, requests, tokens in rows}

    def fold(self, now: int) -> None:
        """Merge old hours into days; in memory, also drop the oldest rows above the limit."""
        until = (now - _HOURS_KEPT_S) // DAY_S * DAY_S
        with self._transaction():
            self._database.execute(_TO_DAYS, {"until": until})
            self._database.execute("DELETE FROM usage WHERE hour < ? AND hour % 86400", (until,))
        if not self._in_memory:
            return
        while self._database.execute("SELECT count(*) FROM usage").fetchone()[0] > _MAX_ROWS_IN_MEMORY:
            oldest, newest = self._database.execute("SELECT min(hour), max(hour) FROM usage").fetchone()
            if oldest == newest:
                return
            with self._transaction():
                self._database.execute("DELETE FROM usage WHERE hour = ?", (oldest,))
                self._database.execute("UPDATE since SET time = max(time, ?)", (oldest + HOUR_S,))

    def read(
        self, since: int, until: int, granularity: str, tenant: str | None = None, task: str | None = None
    ) -> Generator[list[Row], None, None]:
        """Sums by period, tenant and task of the hours that begin in a span, in pages, all as of the first page."""
        self._reads += 1
        name = f"read_{self._reads}"
        period = PERIODS[granularity]
        self._database.execute(
            f"CREATE TEMP TABLE {name} AS SELECT {period} AS period, tenant, task, sum(requests), sum(prompt), "
            "sum(cached), sum(completion) FROM usage WHERE hour >= :since AND hour < :until "
            "AND (:tenant IS NULL OR tenant = :tenant) AND (:task IS NULL OR task = :task) "
            "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            {"since": since, "until": until, "tenant": tenant, "task": task},
        )
        try:
            at = 0
            while rows := self._database.execute(
                f"SELECT * FROM {name} WHERE rowid > ? ORDER BY rowid LIMIT ?", (at, _PAGE_ROWS)
            ).fetchall():
                at += len(rows)
                yield [
                    (begins, row_tenant, row_task, UsageCounts(*sums)) for begins, row_tenant, row_task, *sums in rows
                ]
        finally:
            self._database.execute(f"DROP TABLE {name}")

    def _add(self, records: Iterable[Record], place: tuple[int, int]) -> None:
        usage: defaultdict[tuple[int, str, str], UsageCounts] = defaultdict(UsageCounts)
        for record in records:
            usage[record.at // HOUR_S * HOUR_S, record.tenant, record.task].add(record.counts)
        spent: defaultdict[tuple[str, str], UsageCounts] = defaultdict(UsageCounts)
        for (hour, tenant, _), counts in usage.items():
            for period in periods(hour):
                spent[tenant, period].add(counts)
        with self._transaction():
            self._database.executemany(
                _ADD_USAGE,
                (
                    (*key, each.requests, each.prompt_tokens, each.cached_tokens, each.completion_tokens)
                    for key, each in usage.items()
                ),
            )
            self._database.executemany(_ADD_SPENT, ((*key, each.requests, each.tokens) for key, each in spent.items()))
            self._database.execute("UPDATE journal SET file = ?, offset = ?", place)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
