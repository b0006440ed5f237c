"""Replies that have to wait: a few in memory, the others in files without a name that end with the process."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.disk import disk_errors
from common.errors import RunError
from common.flower import ARRAYS, from_record, to_record
from server.grids.base import WrappingGrid, stream_replies

IN_MEMORY_BYTES: Final = 64 << 20
"""How much of all waiting replies stays in memory."""

MOST_BYTES: Final = 256 << 30
"""How much may wait on disk, however much is free."""

_ALIGNMENT: Final = 64


class Shelf:
    """Replies put aside under a key, each taken once.

    Guarantee: beyond `in_memory` bytes they wait in unlinked files, of which a reader needs only the pages it looks at.
    What is taken is byte for byte what was put, and writing to it changes no file.
    """

    def __init__(self, *, folder: Path | None = None, in_memory: int = IN_MEMORY_BYTES) -> None:
        """An empty shelf.

        Args:
            folder: Where the files are made; None takes the system's folder for temporary files.
            in_memory: Bytes of arrays that wait without a file.
        """
        self._folder = folder
        self._free = in_memory
        self._replies: dict[Hashable, tuple[Message, int]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._replies

    def put(self, key: Hashable, reply: Message) -> None:
        """Put a reply aside; the last under a key counts.

        Raises:
            RunError: The disk is full or cannot be written.
        """
        size = _size(reply)
        if key in self._replies:
            self.take(key)
        if size > self._free:
            reply, size = _on_disk(reply, self._folder), 0
        self._free -= size
        self._replies[key] = (reply, size)

    def take(self, key: Hashable) -> Message:
        """Take a reply away again."""
        reply, size = self._replies.pop(key)
        self._free += size
        return reply


class SpoolingGrid(WrappingGrid):
    """Serves strategies that need every reply: all of a round wait together, most of them on disk.

    Guarantee: a round whose replies could not be kept is refused before anybody is asked. Replies are byte for byte
    what arrived, in the order of arrival.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        folder: Path | None = None,
        in_memory: int = IN_MEMORY_BYTES,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        super().__init__(inner)
        self._folder = folder
        self._in_memory = in_memory
        self._most_bytes = most_bytes

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive.

        Raises:
            RunError: There is no room for one reply of each message.
        """
        messages = list(messages)
        self._check_room(sum(_size(message) for message in messages))
        kept = 0
        for reply in stream_replies(self._inner, messages, timeout):
            size = _size(reply)
            if kept + size > self._in_memory:
                yield _on_disk(reply, self._folder)
            else:
                kept += size
                yield reply
            del reply  # or it stays in memory while the next one arrives

    def _check_room(self, needed: int) -> None:
        """A strategy's update is as large as the model that was sent."""
        if needed <= self._in_memory:
            return
        place = self._folder or Path(tempfile.gettempdir())
        with disk_errors(place, "read"):
            room = min(self._most_bytes, shutil.disk_usage(place).free)
        if needed > room:
            raise RunError(
                f"the round's single updates need {needed >> 20} MiB in {place}, {room >> 20} MiB can be used",
                hint="ask fewer clients a round (cohort.size), or use a strategy that takes the mean, such as fedavg",
            )


def _size(message: Message) -> int:
    """Bytes of a message's arrays."""
    record = message.content.get(ARRAYS) if message.has_content() else None
    if not isinstance(record, ArrayRecord):
        return 0
    return sum(values.nbytes for values in from_record(record).values())


def _on_disk(reply: Message, folder: Path | None) -> Message:
    """The same reply over arrays in a mapped file, private to this process and gone with the last array."""
    record = reply.content[ARRAYS]
    if not isinstance(record, ArrayRecord):
        raise TypeError(ARRAYS)
    place = folder or Path(tempfile.gettempdir())
    with disk_errors(place), tempfile.TemporaryFile(dir=place) as file:
        arrays = _mapped(file, from_record(record))
    content = RecordDict({key: to_record(arrays) if key == ARRAYS else kept for key, kept in reply.content.items()})
    return Message(content, metadata=reply.metadata)  # type: ignore[call-overload,no-any-return]


def _mapped(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Write arrays one after the other; views of the file, copied where they are written to."""
    places: list[int] = []
    for values in arrays.values():
        file.seek(-file.tell() % _ALIGNMENT, 1)
        places.append(file.tell())
        if values.size:
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    file.truncate(max(file.tell(), 1))
    file.flush()
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: np.frombuffer(view, values.dtype, values.size, place).reshape(values.shape)
        if values.size
        else values.copy()
        for (name, values), place in zip(arrays.items(), places, strict=True)
    }
