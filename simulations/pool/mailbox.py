"""Files in memory through which a pool and its workers pass arrays: the model goes out, updates come back."""

from __future__ import annotations

import itertools
import mmap
import operator
import os
import shutil
import tempfile
import weakref
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Final

from flwr.app import Array, ArrayRecord, RecordDict

from common.disk import disk_errors
from common.transport.records import Buffer, decode_records, encode_records

SMALL_BYTES: Final = 1 << 16
"""A reply up to this size takes less time through a pipe than through a file."""


class Mailbox:
    """The pool's end. All files are in a folder of its own, in memory where the system has one for that.

    Where that is full (containers often have 64 MB of it) they go to the folder for temporary files.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
        places = [memory, None] if memory.is_dir() else [None]
        self._folders = [tempfile.TemporaryDirectory(prefix="coterie-", dir=place) for place in places]
        self.folders = [Path(folder.name) for folder in self._folders]
        self._numbers = itertools.count(1)
        self._files: list[Path] = []
        self._current: list[Array] = []
        self._free: list[Path] = []

    def publish(self, records: Mapping[str, ArrayRecord]) -> Path:
        """A file with these records, for all workers; written once for the same arrays.

        Raises:
            RunError: There is no room for it anywhere.
        """
        arrays = [array for record in records.values() for array in record.values()]
        if len(arrays) != len(self._current) or not all(map(operator.is_, arrays, self._current)) or not self._files:
            parts = encode_records(RecordDict(dict(records)))
            self._files.append(self._written(f"{next(self._numbers)}.records", parts))
            self._current = arrays
        return self._files[-1]

    def keep(self, needed: Container[Path | None]) -> None:
        """Remove published files but the current one and those that a busy worker may not have opened yet."""
        for path in [path for path in self._files[:-1] if path not in needed]:
            path.unlink()
            self._files.remove(path)

    def slot(self) -> Path:
        """A file that a worker may write its reply into. It exists once one was written."""
        return self._free.pop() if self._free else self.folders[0] / f"{next(self._numbers)}.reply"

    def read(self, slot: Path, size: int) -> RecordDict:
        """What a worker wrote into a slot, without copying it; the slot is free again when the last array is gone."""
        descriptor = os.open(slot, os.O_RDONLY)
        try:
            mapped = _Mapped(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        weakref.finalize(mapped, self._free.append, slot).atexit = False
        return decode_records(memoryview(mapped))

    def take_back(self, slot: Path) -> None:
        """A slot that nobody writes into any more, and nobody reads."""
        self._free.append(slot)

    def close(self) -> None:
        """Remove all files."""
        for folder in self._folders:
            folder.cleanup()

    def _written(self, name: str, parts: Sequence[Buffer]) -> Path:
        """A new file, in the first folder that has room."""
        for folder in self.folders[:-1]:
            path = folder / name
            try:
                with path.open("xb") as file:
                    file.writelines(parts)
            except OSError:
                path.unlink(missing_ok=True)
            else:
                return path
        path = self.folders[-1] / name
        with disk_errors(path), path.open("xb") as file:
            file.writelines(parts)
        return path


class _Mapped(mmap.mmap):
    """A mapping that can be watched until it is gone."""


class Writer:
    """A worker's end."""

    def __init__(self) -> None:
        self._slots: dict[str, mmap.mmap] = {}
        self._read = ("", RecordDict())

    def published(self, path: str) -> RecordDict:
        """The records of a published file, mapped, until another one is asked for."""
        if path != self._read[0]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self._read = path, decode_records(memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)))
            finally:
                os.close(descriptor)
        return self._read[1]

    def write(self, slot: str, parts: Sequence[Buffer]) -> int | None:
        """Write a reply into a slot; its size, or None where it is small, or there is no room for it."""
        size = sum(map(len, parts))
        if size <= SMALL_BYTES:
            return None
        try:
            mapped = self._slot(slot, size)
        except OSError:
            return None
        end = 0
        for part in parts:
            begin, end = end, end + len(part)
            mapped[begin:end] = part
        return size

    def _slot(self, slot: str, size: int) -> mmap.mmap:
        """The slot's file, mapped; its pages are reserved, because nobody can be told that one of them is missing."""
        known = self._slots.get(slot)
        if known is None or len(known) < size:
            descriptor = os.open(slot, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _reserve(descriptor, size)
                known = self._slots[slot] = mmap.mmap(descriptor, 0)
            finally:
                os.close(descriptor)
        return known


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, max(size, os.fstat(descriptor).st_size))


def remove(folders: Sequence[Path]) -> None:
    """Remove a mailbox whose pool was killed."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
