"""The small signed half of a sealed message, one for each recipient: fixed fields at fixed places.

    header | commitment 32 | flag 1 | blob digest 32 | recipient key id 32 | wrapped key 1168 | signature

The flag is 1 for a broadcast, whose recipients share the content key: the digest of the ciphertext is signed, so that
none of them can forge a model for the others. Otherwise flag and digest are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from common.crypto.header import HEADER_BYTES, Header
from common.crypto.identity import KEY_ID_BYTES, WRAP_BYTES, PartyRecord, Suite
from common.crypto.refusal import SealError

SIGNATURE_LABEL = b"coterie envelope v1"
DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)

_SIGNED_BYTES = HEADER_BYTES + DIGEST_BYTES + 1 + DIGEST_BYTES + KEY_ID_BYTES + WRAP_BYTES
ENVELOPE_BYTES = {suite: _SIGNED_BYTES + suite.signature_bytes for suite in Suite}
_SPLITS = (HEADER_BYTES, DIGEST_BYTES, 1, DIGEST_BYTES, KEY_ID_BYTES, WRAP_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """The fields of an envelope; nothing in it is verified by reading it.

    Attributes:
        header: What the message says of itself.
        commitment: What its content key must derive.
        blob_digest: SHA-256 of a broadcast's ciphertext; None for a direct message.
        recipient: Whom it is for, a `key_id`.
        wrapped: The content key, for the recipient's keys.
        signed: All bytes that are signed.
        signature: By the sender.
    """

    header: Header
    commitment: bytes
    blob_digest: bytes | None
    recipient: bytes
    wrapped: bytes
    signed: bytes
    signature: bytes

    @classmethod
    def from_bytes(cls, data: bytes, sender: PartyRecord | None = None) -> Self:
        """Take an envelope apart; with a sender, its suite must be that of the sender's record.

        Raises:
            SealError: `length`, `version`, `suite`, `limits` or `context`.
        """
        if len(data) not in ENVELOPE_BYTES.values():
            raise SealError("length")
        header = Header.from_bytes(data[:HEADER_BYTES])
        if sender is not None and header.suite is not sender.suite:
            raise SealError("suite")
        if len(data) != ENVELOPE_BYTES[header.suite]:
            raise SealError("length")
        fields, at = [], 0
        for size in _SPLITS:
            fields.append(data[at : at + size])
            at += size
        _, commitment, flag, digest, recipient, wrapped = fields
        if flag not in {b"\0", b"\1"} or (flag == b"\0" and digest != NO_DIGEST):
            raise SealError("context")
        return cls(
            header=header,
            commitment=commitment,
            blob_digest=digest if flag == b"\1" else None,
            recipient=recipient,
            wrapped=wrapped,
            signed=data[:at],
            signature=data[at:],
        )


def peek(envelope: bytes) -> Header:
    """The header of an envelope, unauthenticated: good for routing and nothing else.

    Raises:
        SealError: It is no envelope.
    """
    return Envelope.from_bytes(envelope).header
