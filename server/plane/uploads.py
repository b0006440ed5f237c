"""Updates on their way in: files that grow as frames come, and can be continued after a broken stream.

Everything that touches the disk blocks, and is called in worker threads; `received` and `drop` may be called anywhere.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from common.disk import sync
from common.transport.wire import Refusal
from server.plane.refusals import RefusedCallError

log = structlog.get_logger()

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(eq=False, slots=True)
class _Staged:
    """What there is of one update."""

    path: Path
    envelope: bytes
    size: int
    received: int = 0
    writer: object = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Uploads:
    """Unfinished updates by message id.

    Guarantee: an update's bytes are those of one announced envelope and size, in order and without gaps; one stream
    writes at a time. Of an update that was dropped nothing stays on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staged: dict[bytes, _Staged] = {}
        self._lock = threading.Lock()

    def received(self, message_id: bytes) -> int:
        """How many bytes of an unfinished update are there."""
        staged = self._staged.get(message_id)
        return staged.received if staged else 0

    def begin(self, message_id: bytes, *, envelope: bytes, size: int, offset: int) -> Writing:
        """Start or continue an update. A stream that still writes it is superseded.

        Raises:
            RefusedCallError: `offset` is not what is there, or another envelope or size was announced before; with
                offset 0 the latter starts anew.
        """
        with self._lock:
            staged = self._staged.get(message_id)
            if staged is not None and (staged.envelope, staged.size) != (envelope, size):
                if offset:
                    raise RefusedCallError(Refusal.OTHER_UPDATE)
                self._forget(message_id)
                staged = None
            if staged is None:
                if offset:
                    raise RefusedCallError(Refusal.WRONG_OFFSET)
                staged = _Staged(self._folder / f"{message_id.hex()}.part", envelope, size)
                self._staged[message_id] = staged
            writing = Writing(staged, drop=lambda: self.drop(message_id))
            staged.writer = writing
        writing.open(offset)
        return writing

    def drop(self, message_id: bytes) -> None:
        """Forget an update. A stream that writes it is refused at its next frame."""
        with self._lock:
            self._forget(message_id)

    def _forget(self, message_id: bytes) -> None:
        staged = self._staged.pop(message_id, None)
        if staged is not None:
            staged.writer = None
            staged.path.unlink(missing_ok=True)


class Writing:
    """One stream's hold on an unfinished update."""

    def __init__(self, staged: _Staged, *, drop: Callable[[], None]) -> None:
        self._staged = staged
        self._drop = drop
        self._file = -1

    @property
    def left(self) -> int:
        """How many bytes are still to come."""
        return self._staged.size - self._staged.received

    def open(self, offset: int) -> None:
        """Take over once the frame of the stream before is on the disk."""
        with self._staged.lock:
            self._check()
            if offset != self._staged.received:
                raise RefusedCallError(Refusal.WRONG_OFFSET)
            try:
                flags = os.O_WRONLY | os.O_CLOEXEC | (0 if offset else os.O_CREAT)
                self._file = os.open(self._staged.path, flags, 0o600)
            except OSError as e:
                raise self._failed(e) from e

    def append(self, frame: bytes) -> None:
        """Write one frame.

        Raises:
            RefusedCallError: It is more than was announced, another stream has taken over, the order was closed, or
                the disk is full. In the first and the last case the update is dropped.
        """
        with self._staged.lock:
            self._check()
            if len(frame) > self.left:
                self._drop()
                raise RefusedCallError(Refusal.TOO_LARGE)
            at = self._staged.received
            try:
                rest = memoryview(frame)
                while rest:
                    written = os.pwrite(self._file, rest, at)
                    at, rest = at + written, rest[written:]
            except OSError as e:
                raise self._failed(e) from e
            self._staged.received = at

    def finish(self) -> Path:
        """Have the complete update on the disk, under a name of its own; it is not among the unfinished any more."""
        with self._staged.lock:
            self._check()
            final = self._staged.path.with_suffix(".update")
            try:
                os.fsync(self._file)
                self._staged.path.rename(final)
                sync(final.parent)
            except OSError as e:
                final.unlink(missing_ok=True)
                raise self._failed(e) from e
            self._drop()
            return final

    def close(self) -> None:
        """Let go of the file; what is written stays for the next stream."""
        with self._staged.lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _check(self) -> None:
        if self._staged.writer is not self:
            dropped = self._staged.writer is None
            raise RefusedCallError(Refusal.UNKNOWN_ORDER if dropped else Refusal.SUPERSEDED)

    def _failed(self, error: OSError) -> RefusedCallError:
        """Nothing is known of the file's content any more."""
        self._drop()
        log.error("plane_upload_not_written", reason=error.strerror, path=str(self._staged.path))
        return RefusedCallError(Refusal.DISK_FULL if error.errno in _FULL else Refusal.FAILED)
