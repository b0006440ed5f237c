"""What a content key becomes: the payload's key, its nonces (STREAM), and the commitment to it.

Every message has a content key of its own, and every derived key depends on the whole header: no nonce is used twice,
and a ciphertext under another header does not open.

Source: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance"
(CRYPTO 2015), STREAM; the layout of nonces is that of Tink's AES-GCM-HKDF streaming.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.crypto.header import CHUNK_BYTES

CONTENT_KEY_BYTES = 32
TAG_BYTES = 16
_KEY, _PREFIX, _COMMITMENT = 32, 7, 32
_PAYLOAD_LABEL, _WRAP_LABEL = b"coterie payload v1", b"coterie wrap v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What is derived from a content key under a header.

    Attributes:
        cipher: AES-256-GCM under the payload's key.
        prefix: First 7 bytes of every nonce.
        commitment: GCM does not commit to its key; this does.
    """

    cipher: AESGCM = field(repr=False)
    prefix: bytes = field(repr=False)
    commitment: bytes

    def nonce(self, chunk: int, *, last: bool) -> bytes:
        """Nonce of a chunk: its place and whether the message ends there, so that neither can be changed."""
        return self.prefix + chunk.to_bytes(4, "big") + (b"\1" if last else b"\0")


def derive(content_key: bytes, header_digest: bytes) -> Schedule:
    """Derive everything from a content key."""
    size = _KEY + _PREFIX + _COMMITMENT
    derived = HKDF(SHA256(), size, salt=header_digest, info=_PAYLOAD_LABEL).derive(content_key)
    return Schedule(
        cipher=AESGCM(derived[:_KEY]), prefix=derived[_KEY : _KEY + _PREFIX], commitment=derived[_KEY + _PREFIX :]
    )


def wrap_info(header_digest: bytes, recipient: bytes) -> bytes:
    """What a wrapped content key is bound to: HPKE's single-shot form takes context only as `info`."""
    return _WRAP_LABEL + header_digest + recipient


def chunk_count(plaintext_bytes: int) -> int:
    """How many chunks there are; an empty plaintext has one empty chunk."""
    return max(1, -(-plaintext_bytes // CHUNK_BYTES))


def blob_size(plaintext_bytes: int) -> int:
    """Length of the ciphertext: one tag a chunk more."""
    return plaintext_bytes + TAG_BYTES * chunk_count(plaintext_bytes)
