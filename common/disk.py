"""Files that an interruption never damages, locks that end with their process, and a full disk as a clear error."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from common.errors import RunError

_LOCK_ATTEMPTS, _LOCK_PAUSE_SECONDS = 5, 0.02


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` when the block ends without error.

    Guarantee:
        Whenever the process or the machine stops, `path` is what it was before or what was written, never a part of it.

    Raises:
        RunError: The disk is full or the folder cannot be written. `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, action: Literal["read", "written"] = "written") -> Iterator[None]:
    """Turn what the operating system refuses into a RunError that says what to do."""
    try:
        yield
    except OSError as e:
        hint = {
            errno.ENOSPC: "free some space, then resume the run",
            errno.EDQUOT: "free some of your quota, then resume the run",
            errno.EROFS: "the disk is read-only: choose another folder",
            errno.EACCES: "choose another folder, or mend its permissions",
            errno.EPERM: "choose another folder, or mend its permissions",
        }.get(e.errno or 0, "check the path and the disk")
        raise RunError(f"{path} cannot be {action}: {e.strerror or e}", hint=hint) from e


def acquire_lock(lock_file: Path) -> int:
    """Take a lock without waiting for another holder; the descriptor that holds it.

    Raises:
        RunError: Another process holds it.
    """
    lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for _ in range(_LOCK_ATTEMPTS):
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(_LOCK_PAUSE_SECONDS)  # `is_locked` takes it for an instant, too
    except OSError:  # a file system without locks
        os.close(lock)
        raise
    os.close(lock)
    raise RunError(
        f"{lock_file.parent} is being written by another process", hint="wait for it to end, or choose another folder"
    )


def is_locked(lock_file: Path) -> bool:
    """Whether a living process holds a lock."""
    with suppress(OSError), lock_file.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: flushing a new file alone leaves its name to
    chance.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
