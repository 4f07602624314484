"""Keeps copies of verified versions, named by content, in a local folder that only this server writes.

The engine loads only these copies. So it loads exactly the verified bytes, even if the folder of adapters has changed
since.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

from server.errors import AdapterError
from server.settings import Settings

_PREFIX = "mtlora-adapters-"


class SpoolError(Exception):
    """The folder cannot be written; the message names it."""


class SpoolFullError(AdapterError):
    """The copy of a version would exceed the spool's limit."""


class Spool:
    """A folder of its own in `parent`, by default the system's temporary folder; `close` removes it.

    Versions with equal bytes share a copy; the last `release` removes it. At start, a server removes spools of dead
    servers, recognised by their released locks. `max_bytes` bounds all copies together, including unfinished ones;
    None: no limit. Raises SpoolError.
    """

    def __init__(self, parent: Path | None = None, max_bytes: int | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(parent)
            self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            raise SpoolError(f"{parent}: no copies of adapters can be written: {error} (adapter_cache)") from None
        self._lock = _try_lock(self.root)
        self._max_bytes = max_bytes
        # Sizes by name in `root`. The lock is needed because verifying threads change them too.
        self._sizes: dict[str, int] = {}
        self._users: Counter[str] = Counter()
        self._changing = threading.RLock()

    @classmethod
    def from_settings(cls, settings: Settings) -> "Spool":
        limit_gib = settings.adapter_cache_gib
        return cls(settings.adapter_cache, None if limit_gib is None else int(limit_gib * (1 << 30)))

    @property
    def bytes(self) -> int:
        """Bytes of all copies, including bytes reserved for unfinished ones."""
        with self._changing:
            return sum(self._sizes.values())

    def reserve(self, name: str, size: int) -> None:
        """Reserve `size` bytes for a copy with this name. Raises SpoolFullError."""
        with self._changing:
            used = self.bytes - self._sizes.get(name, 0)
            if self._max_bytes is not None and used + size > self._max_bytes:
                raise SpoolFullError(
                    f"no space for a copy of {size} bytes: copies of adapters take {used} bytes of {self._max_bytes} "
                    "(adapter_cache_gib)"
                )
            self._sizes[name] = size

    def free(self, name: str) -> None:
        """Release the bytes reserved for `name`."""
        with self._changing:
            self._sizes.pop(name, None)

    def incoming(self, size: int = 0) -> Path:
        """Make an empty folder for a copy of `size` bytes to verify. Raises SpoolFullError."""
        folder = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self.root))
        try:
            self.reserve(folder.name, size)
        except SpoolFullError:
            folder.rmdir()
            raise
        return folder

    def keep(self, incoming: Path, content: str) -> Path:
        """Keep a verified copy; returns the folder to load from. Each call needs one `release`.

        Raises SpoolFullError if the files have grown since then and exceed the limit.
        """
        folder = self.root / content
        with self._changing:
            if folder.exists():
                self.discard(incoming)
            else:
                self.reserve(incoming.name, sum(file.stat().st_size for file in incoming.iterdir()))
                for file in incoming.iterdir():
                    file.chmod(0o400)
                os.rename(incoming, folder)
                self._sizes[content] = self._sizes.pop(incoming.name)
            self._users[content] += 1
        return folder

    def release(self, content: str) -> None:
        """Give up one use of a copy; the last one removes it."""
        with self._changing:
            self._users[content] -= 1
            if self._users[content] <= 0:
                del self._users[content]
                shutil.rmtree(self.root / content, ignore_errors=True)
                self.free(content)

    def discard(self, incoming: Path) -> None:
        """Remove a refused copy."""
        shutil.rmtree(incoming, ignore_errors=True)
        self.free(incoming.name)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and (lock := _try_lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder; returns its descriptor, or None if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
