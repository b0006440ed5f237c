"""Members of a site under Flower's own runtime, which starts a process for every message: in files, in memory."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
from flwr.app import Context

from client.secagg.members import STALE_SECONDS, Seat
from common.disk import disk_errors
from common.errors import RefusedError
from common.secagg.member import Member
from common.secagg.refusal import SecAggError

log = structlog.get_logger()

_SUFFIX: Final = ".member"
_OWN: Final = 0o700


class FolderMembers:
    """Members in files of one folder, which only this user can enter.

    Guarantee: a file is whole or not there. One that cannot be read, or that nobody used for a day, is removed: that
    member joins the next epoch.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder that `memory_folder` found."""
        self._folder = folder

    @contextmanager
    def open(self, run_id: bytes, seat: Callable[[], Seat], context: Context) -> Iterator[Member]:  # noqa: ARG002
        """See `Members`.

        Raises:
            RunError: The folder cannot be written.
        """
        path = self._folder / f"{run_id.hex()}{_SUFFIX}"
        with _alone(self._folder):
            self._remove_stale()
            place = seat()  # reads the journal, which another process may have written to until now
            member = _read(path, place) or place.new()
            try:
                yield member
            finally:
                _write(path, member.to_bytes())

    def _remove_stale(self) -> None:
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


def memory_folder(key_id: bytes, *, otherwise: Path, candidates: Sequence[Path] | None = None) -> Path:
    """A folder for secrets that a power cut should wipe: of this user's session, of shared memory, or on the disk.

    What lies in memory can still be swapped out: use an encrypted swap, or none.

    Args:
        key_id: Whose secrets: the folder is named after it, and two kits never share one.
        otherwise: A folder on the disk, where there is no file system in memory.
        candidates: File systems in memory; None takes those of this machine.
    """
    if candidates is None:
        session = os.environ.get("XDG_RUNTIME_DIR")
        candidates = [*([Path(session)] if session else []), Path("/dev/shm")]  # noqa: S108 - a private folder in it
    for candidate in candidates:
        folder = candidate / f"coterie-{os.getuid()}-{key_id.hex()[:32]}"
        with suppress(OSError):
            folder.mkdir(mode=_OWN, exist_ok=True)
            if _is_private(folder):
                return folder
    with disk_errors(otherwise):
        otherwise.mkdir(mode=_OWN, parents=True, exist_ok=True)
    return otherwise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time look something up and act upon it; others wait."""
    with disk_errors(folder, "read"):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's own alone: in shared memory another user may have made it, or a link, before."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == _OWN


def _read(path: Path, seat: Seat) -> Member | None:
    try:
        return seat.restored(path.read_bytes())
    except FileNotFoundError:
        return None
    except (RefusedError, OSError) as e:
        if isinstance(e, SecAggError) and e.reason == "rules":  # one run id for two configurations: never a new member
            raise
        log.warning("member_not_restored", error=type(e).__name__)
        return None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with disk_errors(path):
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
