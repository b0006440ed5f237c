"""Opening: who sent it, for whom, how large, is checked before any key; every byte before it is used."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from cryptography.exceptions import InvalidTag

from common.crypto.envelope import SIGNATURE_LABEL, Envelope
from common.crypto.header import CHUNK_BYTES, ENDS, Header
from common.crypto.identity import PartyRecord
from common.crypto.keys import PartyKeys
from common.crypto.refusal import SealError
from common.crypto.schedule import TAG_BYTES, Schedule, blob_size, chunk_count, derive, wrap_info


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """An envelope that was verified; its ciphertext is read next.

    Attributes:
        header: What the sender says of the message.
        blob_digest: SHA-256 of a broadcast's ciphertext; None for a direct message.
        blob_bytes: Exact length of the ciphertext.
    """

    header: Header
    blob_digest: bytes | None
    blob_bytes: int
    _schedule: Schedule = field(repr=False)

    def read(self, source: BinaryIO | bytes | bytearray | memoryview, out: bytearray | memoryview) -> None:
        """Decrypt the ciphertext into `out`, which is exactly `header.plaintext_bytes` long.

        A source that is in memory is read where it lies, a third faster than through a file.

        Guarantee:
            When it returns, every chunk, their order, the end, and for a broadcast the digest of the whole ciphertext
            have been verified. When it raises, no plaintext is left in `out`. Nothing in it may be used before.

        Raises:
            SealError: `length`, `truncated`, `chunk` or `digest`.
            OSError: The source cannot be read.
        """
        view = memoryview(out).cast("B")
        if view.nbytes != self.header.plaintext_bytes:
            raise SealError("length")
        try:
            self._read(_taker(source), view)
        except BaseException:
            _wipe(view)
            raise

    def _read(self, take: Callable[[int], memoryview], out: memoryview) -> None:
        decrypt_into, nonce = self._schedule.cipher.decrypt_into, self._schedule.nonce
        hashed = None if self.blob_digest is None else hashlib.sha256()
        last = chunk_count(out.nbytes) - 1
        for number in range(last + 1):
            plain = out[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            encrypted = take(plain.nbytes + TAG_BYTES)
            if encrypted.nbytes != plain.nbytes + TAG_BYTES:
                raise SealError("truncated")
            if hashed is not None:
                hashed.update(encrypted)
            try:
                decrypt_into(nonce(number, last=number == last), encrypted, None, plain)
            except InvalidTag as e:
                raise SealError("chunk") from e
        if take(1):
            raise SealError("length")
        if hashed is not None and not hmac.compare_digest(hashed.digest(), self.blob_digest or b""):
            raise SealError("digest")


def open_envelope(envelope: bytes, *, sender: PartyRecord, recipient: PartyKeys, most_bytes: int) -> Opening:
    """Verify an envelope: cheap checks first, keys last.

    Lengths, version, the suite of the sender's pinned record, sizes, sender, recipient and their roles, signatures;
    then the recipient's key opens the content key, and that must be the one committed to.

    Args:
        envelope: What came.
        sender: The pinned record of whom it must be from.
        recipient: Whose keys open it.
        most_bytes: Most plaintext that is accepted.

    Raises:
        SealError: It is refused.
    """
    fields = Envelope.from_bytes(envelope, sender)
    header, me = fields.header, recipient.record
    if header.plaintext_bytes > most_bytes:
        raise SealError("limits")
    if header.sender != sender.key_id:
        raise SealError("sender")
    if fields.recipient != me.key_id:
        raise SealError("recipient")
    if (sender.role, me.role) != ENDS[header.direction]:
        raise SealError("context")
    sender.verify(SIGNATURE_LABEL, fields.signed, fields.signature)
    content_key = recipient.unwrap(fields.wrapped, wrap_info(header.digest, fields.recipient))
    schedule = derive(content_key, header.digest)
    if not hmac.compare_digest(schedule.commitment, fields.commitment):
        raise SealError("commitment")
    return Opening(
        header=header,
        blob_digest=fields.blob_digest,
        blob_bytes=blob_size(header.plaintext_bytes),
        _schedule=schedule,
    )


def _taker(source: BinaryIO | bytes | bytearray | memoryview) -> Callable[[int], memoryview]:
    """A function that takes the next bytes, as many as there are; what it gives is valid until the next call."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_memory(memoryview(source).cast("B"))
    return _from_stream(source)


def _from_memory(data: memoryview) -> Callable[[int], memoryview]:
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        at += size
        return data[at - size : at]

    return take


def _from_stream(source: BinaryIO) -> Callable[[int], memoryview]:
    readinto: Callable[[memoryview], int | None] | None = getattr(source, "readinto", None)
    buffer = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))

    def fill(rest: memoryview) -> int:
        if readinto is not None:
            return readinto(rest) or 0
        data = source.read(rest.nbytes)
        rest[: len(data)] = data
        return len(data)

    def take(size: int) -> memoryview:
        done = 0
        while done < size and (count := fill(buffer[done:size])):
            done += count
        return buffer[:done]

    return take


def _wipe(view: memoryview) -> None:
    """Leave zeros, so that plaintext which was not verified cannot be used by mistake."""
    zeros = bytes(CHUNK_BYTES)
    for at in range(0, view.nbytes, CHUNK_BYTES):
        part = view[at : at + CHUNK_BYTES]
        part[:] = zeros[: part.nbytes]
