"""Replaces whole folders in one step, writes files durably, locks files and detects changes."""

import ctypes
import errno
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Error numbers of file systems (NFS, some overlays) and old kernels that cannot exchange two folders.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}


@contextmanager
def folder_in_the_making(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, on the same file system, removed at the end unless `put_in_place` moved it.

    A killed process leaves a hidden `.NAME-…` folder behind; nothing reads it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        yield made


def put_in_place(made: Path, folder: Path) -> None:
    """Move the folder `made` to `folder`; an old `folder` moves to the place of `made`.

    At every moment, `folder` is the old one or the new one. Exception: if the file system cannot exchange two folders,
    `folder` is absent between two renames; if the second fails, the first is undone. Raises OSError.
    """
    sync(made)
    try:
        if os.path.lexists(folder):
            _exchange(made, folder)
        else:
            os.rename(made, folder)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        old = made.with_name("old")
        try:
            os.rename(folder, old)
            os.rename(made, folder)
        except BaseException:
            if old.exists() and not os.path.lexists(folder):
                os.rename(old, folder)
            raise
    sync(folder.parent)


def make_folders(folder: Path) -> None:
    """Make a folder and its parents, readable for every user, whatever the umask."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        each.chmod(0o755)


def let_all_read(folder: Path) -> None:
    """Let every user read a folder and the files in it, whatever the umask: servers often run as another user."""
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)


def signature(path: Path) -> tuple[int, ...] | None:
    """A value that changes whenever the file at the path is written or replaced; None if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes. The lock file is not removed; the lock ends with its process."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_for_this_process(path: Path) -> IO[str]:
    """Lock a file until the returned one is closed, or this process ends in any way.

    Raises BlockingIOError, with what the holder wrote to the file, if another process holds it; another OSError if the
    file system has no locks. It is a POSIX lock: child processes do not inherit it, and it works over NFS.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, holder) from None
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step, durably."""
    temporary = path.with_suffix(".tmp")
    write_durably(temporary, content)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
