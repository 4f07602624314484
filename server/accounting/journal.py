"""Append-only files of records, one per line. Written records survive a kill of the process.

A completed write is in the kernel's page cache, so a killed process loses nothing. A power failure may lose records
that `Totals` has not summed up yet, about the last second.
"""

import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

_NAME = "journal-"
# Size at which a new file is started; files whose records are summed up are removed.
SEGMENT_BYTES = 16 << 20
# Most bytes that wait in memory while the disk refuses writes: some 20,000 records.
_MAX_UNWRITTEN = 1 << 20


@dataclass(slots=True)
class UsageCounts:
    """requests: sequences, so a batch of several inputs counts each. cached_tokens are among the prompt_tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "UsageCounts") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens

    @property
    def tokens(self) -> int:
        """The tokens that budgets count."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Record:
    """The usage of one call. at: seconds since 1970."""

    at: int
    tenant: str
    task: str
    counts: UsageCounts

    def line(self) -> bytes:
        # Separate fields by blanks: ids of tenants and tasks contain none.
        counts = self.counts
        return (
            f"{self.at} {self.tenant} {self.task} {counts.requests} {counts.prompt_tokens} {counts.cached_tokens} "
            f"{counts.completion_tokens}\n"
        ).encode()


def parse(lines: bytes) -> Iterator[Record]:
    """The records of valid lines. Ignores lines that a full disk or a power failure has damaged."""
    for line in lines.split(b"\n")[:-1]:
        try:
            at, tenant, task, *counts = line.decode("ascii").split(" ")
            record = Record(int(at), tenant, task, UsageCounts(*map(int, counts)))
        except (ValueError, TypeError):
            continue
        if len(counts) == len(astuple(record.counts)):
            yield record


class Journal:
    """Files in `folder`; without a folder, in memory. One thread appends; another one reads and removes.

    Files have numbers that never come back: a reader that remembers a number and an offset reads each record once.
    """

    def __init__(self, folder: Path | None, first: int) -> None:
        self._folder = folder
        self._files: dict[int, int] = {}
        # Records, or the rest of one, that could not be written yet; written before the next record.
        self._unwritten = b""
        for path in folder.glob(_NAME + "[0-9]" * 10) if folder else ():
            self._open(int(path.name.removeprefix(_NAME)))
        self._open(max((first - 1, *self._files)) + 1)

    def append(self, line: bytes) -> None:
        """Write earlier unwritten records, then this one. Raises OSError if not everything could be written."""
        self._unwritten = data = self._unwritten + line
        written = os.write(self._file, data)
        self._unwritten = data[written:]
        if self._unwritten:
            raise OSError(f"{written} of {len(data)} bytes were written")
        self._size += written
        if self._size >= SEGMENT_BYTES:
            self._open(self._number + 1)

    @property
    def unwritten(self) -> bool:
        """Whether records wait for the disk."""
        return bool(self._unwritten)

    @property
    def full(self) -> bool:
        """Whether more than `_MAX_UNWRITTEN` bytes of records wait for the disk."""
        return len(self._unwritten) > _MAX_UNWRITTEN

    @property
    def numbers(self) -> list[int]:
        """The files' numbers, oldest first."""
        return sorted(self._files)

    def read(self, number: int, offset: int) -> bytes:
        """The complete lines of a file after an offset."""
        data = bytearray()
        while piece := os.pread(self._files[number], 1 << 20, offset + len(data)):
            data += piece
        return bytes(data[: data.rfind(b"\n") + 1])

    def remove(self, number: int) -> None:
        """Remove a file that is no longer written to."""
        if self._folder:
            self._path(number).unlink(missing_ok=True)
        os.close(self._files.pop(number))

    def _open(self, number: int) -> None:
        if self._folder:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._files[number] = os.open(self._path(number), flags, 0o600)
        else:
            self._files[number] = os.memfd_create("usage")
        self._number, self._file, self._size = number, self._files[number], 0

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{_NAME}{number:010d}"
