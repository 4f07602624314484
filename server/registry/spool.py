"""Copies of verified versions, by content, in a local folder that only this server writes.

The engine loads from here alone, so it loads what was verified, even after an eviction and whatever happened to the
folder of adapters since.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

_PREFIX = "mtlora-adapters-"


class Spool:
    """A folder of its own in `parent`, by default the system's temporary folder; `close` removes it.

    Versions with equal bytes share a copy; the last `release` removes it. A server that starts removes the spools of
    servers that died: their locks ended with them.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = _try_lock(self.root)
        self._users: Counter[str] = Counter()

    def incoming(self) -> Path:
        """Make an empty folder for a copy to verify."""
        return Path(tempfile.mkdtemp(prefix=".incoming-", dir=self.root))

    def keep(self, incoming: Path, content: str) -> Path:
        """Keep a verified copy; returns the folder to load from. Each call needs one `release`."""
        folder = self.root / content
        self._users[content] += 1
        if folder.exists():
            shutil.rmtree(incoming)
            return folder
        for file in incoming.iterdir():
            file.chmod(0o400)
        os.rename(incoming, folder)
        return folder

    def release(self, content: str) -> None:
        """Give up one use of a copy; the last one removes it."""
        self._users[content] -= 1
        if self._users[content] <= 0:
            del self._users[content]
            shutil.rmtree(self.root / content, ignore_errors=True)

    def discard(self, incoming: Path) -> None:
        """Remove a refused copy."""
        shutil.rmtree(incoming, ignore_errors=True)

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
