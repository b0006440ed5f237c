"""Digests and derived keys of secure aggregation: each has a label of its own, and every part its length before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


def label(what: str) -> bytes:
    """The label of a purpose, for a digest, a derived key or a signature."""
    return b"coterie secagg " + what.encode() + b" v1"


def joined(parts: Iterable[bytes]) -> bytes:
    """Parts one after another, each behind its length: two lists never give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def digest(what: str, *parts: bytes) -> bytes:
    """SHA-256 of parts for one purpose."""
    return hashlib.sha256(joined((label(what), *parts))).digest()


def derive(secret: bytes, what: str, *parts: bytes, salt: bytes | None = None) -> bytes:
    """A key of 32 bytes for one purpose (HKDF with SHA-256)."""
    return HKDF(SHA256(), KEY_BYTES, salt, joined((label(what), *parts))).derive(secret)


def number(value: int) -> bytes:
    """A number as a part."""
    return value.to_bytes(8, "big")


def ranks(values: Iterable[int]) -> bytes:
    """Ranks as one part."""
    return b"".join(value.to_bytes(2, "big") for value in values)
