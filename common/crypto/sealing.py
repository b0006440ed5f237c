"""Sealing: one pass over the parts, ciphertext into a sink, an envelope for each recipient."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from cryptography.utils import Buffer

from common.crypto.envelope import NO_DIGEST, SIGNATURE_LABEL
from common.crypto.header import CHUNK_BYTES, ENDS, Header
from common.crypto.identity import PartyRecord
from common.crypto.keys import PartyKeys
from common.crypto.refusal import SealError
from common.crypto.schedule import CONTENT_KEY_BYTES, TAG_BYTES, blob_size, chunk_count, derive, wrap_info


@dataclass(kw_only=True, slots=True)
class Sealed:
    """A sealed message whose ciphertext lies in the sink.

    Attributes:
        header: The header as it was sealed.
        digest: SHA-256 of a broadcast's ciphertext; zeros otherwise.
        blob_bytes: Length of the ciphertext.
    """

    header: Header
    digest: bytes
    blob_bytes: int
    _commitment: bytes = field(repr=False)
    _content_key: bytes = field(repr=False)
    _sender: PartyKeys = field(repr=False)
    _broadcast: bool
    _recipient: bytes | None = None

    def envelope_for(self, recipient: PartyRecord) -> bytes:
        """The signed envelope for a recipient; a direct message has one recipient only.

        Raises:
            SealError: `recipient`: a direct message would get a second one, who could forge it for the first;
                `context`: such a message is not for a party of this role.
        """
        if recipient.role != ENDS[self.header.direction][1]:
            raise SealError("context")
        key_id = recipient.key_id
        if not self._broadcast and self._recipient not in {None, key_id}:
            raise SealError("recipient")
        self._recipient = key_id
        wrapped = recipient.wrap(self._content_key, wrap_info(self.header.digest, key_id))
        flag = b"\1" if self._broadcast else b"\0"
        signed = self.header.to_bytes() + self._commitment + flag + self.digest + key_id + wrapped
        return signed + self._sender.sign(SIGNATURE_LABEL, signed)


def seal(parts: Iterable[Buffer], header: Header, *, sender: PartyKeys, sink: BinaryIO, broadcast: bool) -> Sealed:
    """Encrypt parts, one after another, under a fresh content key.

    Args:
        parts: What is sealed, as buffers of any sizes; together `header.plaintext_bytes` long.
        header: Its suite is set to the sender's.
        sender: Who signs.
        sink: Takes the ciphertext; when its `write` returns it must be done with the buffer, which is used again.
        broadcast: Whether there is more than one recipient: then the ciphertext's digest is signed, too.

    Raises:
        SealError: `sender` or `context`: the header is not one of this sender's; `length`: the parts are not as long as
            the header says. What the sink holds then is worthless.
        OSError: The sink does not take it.
    """
    return _seal(
        parts, header, sender=sender, sink=sink, broadcast=broadcast, content_key=os.urandom(CONTENT_KEY_BYTES)
    )


def _seal(
    parts: Iterable[Buffer],
    header: Header,
    *,
    sender: PartyKeys,
    sink: BinaryIO,
    broadcast: bool,
    content_key: bytes,
) -> Sealed:
    """`seal` under a given content key: only test vectors may choose one, for a key that seals twice reveals both."""
    record = sender.record
    if header.sender != record.key_id:
        raise SealError("sender")
    if record.role != ENDS[header.direction][0]:
        raise SealError("context")
    header = replace(header, suite=record.suite)
    schedule = derive(content_key, header.digest)
    encrypt_into = schedule.cipher.encrypt_into
    buffer = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
    hashed = hashlib.sha256() if broadcast else None
    last = chunk_count(header.plaintext_bytes) - 1
    for number, chunk in enumerate(_chunks(parts, header.plaintext_bytes)):
        encrypted = buffer[: chunk.nbytes + TAG_BYTES]
        encrypt_into(schedule.nonce(number, last=number == last), chunk, None, encrypted)
        if hashed is not None:
            hashed.update(encrypted)
        if (written := sink.write(encrypted)) is not None and written != encrypted.nbytes:
            raise OSError(errno.EIO, "the sink did not take a whole chunk")  # an unbuffered file on a full disk
    return Sealed(
        header=header,
        digest=NO_DIGEST if hashed is None else hashed.digest(),
        blob_bytes=blob_size(header.plaintext_bytes),
        _commitment=schedule.commitment,
        _content_key=content_key,
        _sender=sender,
        _broadcast=broadcast,
    )


def _chunks(parts: Iterable[Buffer], size: int) -> Iterator[memoryview]:
    """Cut parts into chunks; only a chunk that spans parts is copied. Each is used before the next is asked for.

    Raises:
        SealError: `length`: the parts are not `size` bytes long.
    """
    spanning = memoryview(bytearray(min(CHUNK_BYTES, size)))
    done = held = 0
    for part in parts:
        view = _as_bytes(part)
        while view.nbytes:
            wanted = min(CHUNK_BYTES, size - done)
            taken = min(wanted - held, view.nbytes)
            if not taken:
                raise SealError("length")
            if taken < wanted:
                spanning[held : held + taken] = view[:taken]
            held += taken
            if held == wanted:
                yield view[:taken] if taken == wanted else spanning[:wanted]
                done, held = done + wanted, 0
            view = view[taken:]
    if done != size:
        raise SealError("length")
    if not size:
        yield spanning


def _as_bytes(part: Buffer) -> memoryview:
    """A buffer's bytes in place; one without elements cannot be cast, and has none."""
    view = memoryview(part)
    return view.cast("B") if view.nbytes else memoryview(b"")
