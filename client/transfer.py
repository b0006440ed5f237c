"""Blobs in and updates out, however often the connection breaks: what is there is never sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from client.connection import Backoff, CallRefusedError, Connection, refusals
from client.outbox import Update
from common.errors import FailureCode, PeerError
from common.transport import wire_pb2
from common.transport.channel import PlaneCalls
from common.transport.wire import FRAME_BYTES, Refusal

Wanted = Callable[[], bool]

_FORGET = {Refusal.UNKNOWN_ORDER, Refusal.UNKNOWN_BLOB, Refusal.TOO_LARGE}


class UnwantedError(Exception):
    """Nobody waits for this any more."""


def fetch_blob(connection: Connection, order: wire_pb2.Order, folder: Path, *, wanted: Wanted) -> Path:
    """The ciphertext of an order as a file in `folder`; nothing in it is verified.

    Guarantee: no more than the order's count of bytes is ever written. What came before a break, also before a restart
    of this process, is not asked for again.

    Raises:
        UnwantedError: The order is closed, or the connection is.
        PeerError: There is more than was announced.
        OSError: The disk is full or cannot be written.
    """
    target = folder / order.blob_digest.hex()
    part = part_of(order, folder)
    backoff = Backoff(connection.patience)
    there = _size(part)
    while there != order.blob_bytes or not part.exists():
        if there > order.blob_bytes:
            part.unlink()
        calls = _calls(connection, wanted)
        try:
            _fetch(calls, order, part, wanted)
        except CallRefusedError as e:
            if e.refusal in _FORGET:
                raise UnwantedError from e
        before, there = there, _size(part)
        if there > before:
            backoff.reset()
        if there != order.blob_bytes:
            connection.pause(backoff.next(), wanted)
    part.replace(target)
    return target


def part_of(order: wire_pb2.Order, folder: Path) -> Path:
    """Where an order's blob lies while it is fetched."""
    return folder / f"{order.blob_digest.hex()}.part"


def _fetch(calls: PlaneCalls, order: wire_pb2.Order, part: Path, wanted: Wanted) -> None:
    with refusals(), part.open("ab") as file:
        there = file.tell()
        stream = calls.fetch(order.blob_digest, offset=there)
        try:
            for frame in stream:
                there += len(frame)
                if there > order.blob_bytes:
                    raise PeerError(FailureCode.INVALID_REQUEST)
                if not wanted():
                    raise UnwantedError
                file.write(frame)
        finally:
            stream.cancel()


def send_update(connection: Connection, update: Update, *, wanted: Wanted) -> None:
    """Send an update until the coordinator has all of it on its disk.

    Guarantee: every attempt sends the same bytes.

    Raises:
        UnwantedError: Nobody waits for it, it is refused for good, or the connection is closed.
    """
    backoff = Backoff(connection.patience)
    offset: int | None = 0  # None: ask how much is there
    furthest = 0
    while True:
        calls = _calls(connection, wanted)
        try:
            with refusals():
                if offset is None:
                    status = calls.upload_state(update.message_id)
                    if status.complete:
                        return
                    offset = min(status.received, update.size)
                    if offset > furthest:
                        furthest = offset
                        backoff.reset()
                start = wire_pb2.UploadStart(
                    message_id=update.message_id, envelope=update.envelope, blob_bytes=update.size, offset=offset
                )
                if calls.upload(start, _frames(update, offset, wanted)).complete:
                    return
            offset = None
        except CallRefusedError as e:
            if e.refusal in _FORGET:
                raise UnwantedError from e
            offset = 0 if e.refusal == Refusal.OTHER_UPDATE else None
        connection.pause(backoff.next(), wanted)


def _frames(update: Update, offset: int, wanted: Wanted) -> Iterator[bytes]:
    """The bytes from an offset on; ends early where nobody wants them."""
    with update.path.open("rb") as file:
        file.seek(offset)
        while wanted() and (frame := file.read(FRAME_BYTES)):
            yield frame


def _calls(connection: Connection, wanted: Wanted) -> PlaneCalls:
    calls = connection.calls(wanted)
    if calls is None:
        raise UnwantedError
    return calls


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
