"""Verified copies of adapters, by content, in a local folder that only this server writes.

The engine loads from here alone. So what was verified is what is loaded, now and after an eviction, whatever happens
to the folder that it was found in.
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
    """`parent`: where the spool's own folder is made, the system's temporary folder by default; `close` removes it.

    Folders of servers that died are removed when the next one starts: a lock ends with its process.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = _try_lock(self.root)
        self._users: Counter[str] = Counter()

    def incoming(self) -> Path:
        """A new empty folder for a copy that is about to be verified."""
        return Path(tempfile.mkdtemp(prefix=".incoming-", dir=self.root))

    def keep(self, incoming: Path, content: str) -> Path:
        """Keep a verified copy under its content; the folder to load from. Each call wants one `release`."""
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
        """Remove a copy with its last user."""
        self._users[content] -= 1
        if self._users[content] <= 0:
            del self._users[content]
            shutil.rmtree(self.root / content, ignore_errors=True)

    def discard(self, incoming: Path) -> None:
        """Remove a copy that was refused."""
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
    """A locked descriptor of a folder; None where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
