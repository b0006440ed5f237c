"""The sealed container written down a second time, plainly and slowly, as `docs/decisions/0014` lays it out.

Vectors are made and judged by it, and tests make what the real code refuses to make. It shares no code with
`common.crypto` but the keys of parties.
"""

import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.crypto import PartyKeys, Suite

FOLDER = Path(__file__).parent
VECTORS = FOLDER / "vectors"
CHUNK = 1024 * 1024
FIELDS = {  # name: (offset, length)
    "magic": (0, 4),
    "version": (4, 1),
    "suite": (5, 1),
    "chunk_log2": (6, 1),
    "direction": (7, 1),
    "kind": (8, 1),
    "run_id": (9, 16),
    "server_round": (25, 8),
    "attempt": (33, 4),
    "sender": (37, 32),
    "message_id": (69, 16),
    "reply_to": (85, 16),
    "plaintext_bytes": (101, 8),
    "manifest": (109, 32),
    "config_digest": (141, 32),
    "cohort_digest": (173, 32),
    "base_digest": (205, 32),
    "commitment": (237, 32),
    "flag": (269, 1),
    "blob_digest": (270, 32),
    "recipient": (302, 32),
    "wrapped": (334, 1168),
    "signature": (1502, 64),
}
HEADER, SIGNED = 237, 1502
DOWN, UP, RESULT = 1, 2, 3


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def parties() -> dict[str, PartyKeys]:
    """The fixed parties of the vectors."""
    found = {}
    for name, fields in json.loads((FOLDER / "parties.json").read_text()).items():
        seeds = {key: bytes.fromhex(seed) for key, seed in fields["seeds"].items()}
        found[name] = PartyKeys(name, fields["role"], Suite(fields["suite"]), seeds)
    return found


def header(sealer: PartyKeys, plaintext_bytes: int, /, **changes) -> bytes:
    """An update's header, or whatever the changes make of it; integers or bytes."""
    fields = {
        "magic": b"COTS",
        "version": 1,
        "suite": int(sealer.record.suite),
        "chunk_log2": 20,
        "direction": UP,
        "kind": 1,
        "run_id": sha256(b"run")[:16],
        "server_round": 3,
        "attempt": 0,
        "sender": sealer.record.key_id,
        "message_id": sha256(b"message")[:16],
        "reply_to": sha256(b"order")[:16],
        "plaintext_bytes": plaintext_bytes,
        "manifest": sha256(b"manifest"),
        "config_digest": sha256(b"config"),
        "cohort_digest": sha256(b"cohort"),
        "base_digest": sha256(b"base"),
    }
    if changes.get("direction") == DOWN:
        fields["reply_to"] = bytes(16)
    fields |= changes
    return b"".join(as_bytes(value, FIELDS[name][1]) for name, value in fields.items())


def as_bytes(value, length: int) -> bytes:
    return value if isinstance(value, bytes) else value.to_bytes(length, "big")


def keys(content_key: bytes, head: bytes) -> tuple[bytes, bytes, bytes]:
    """Payload key, nonce prefix, commitment."""
    derived = HKDF(SHA256(), 71, salt=sha256(head), info=b"coterie payload v1").derive(content_key)
    return derived[:32], derived[32:39], derived[39:]


def encrypt(content_key: bytes, head: bytes, plaintext: bytes, *, ends: bool = True) -> bytes:
    """The ciphertext; `ends=False` leaves the mark of the last chunk away."""
    key, prefix, _ = keys(content_key, head)
    starts = list(range(0, len(plaintext), CHUNK)) or [0]
    blob = b""
    for number, start in enumerate(starts):
        last = ends and number == len(starts) - 1
        nonce = prefix + number.to_bytes(4, "big") + bytes([last])
        blob += AESGCM(key).encrypt(nonce, plaintext[start : start + CHUNK], None)
    return blob


def envelope(sender: PartyKeys, recipient, content_key: bytes, head: bytes, blob: bytes | None = None, **changes):
    """A signed envelope; with a blob for a broadcast. Changes are made before it is signed."""
    key_id = recipient.key_id
    fields = {
        "commitment": keys(content_key, head)[2],
        "flag": 0 if blob is None else 1,
        "blob_digest": bytes(32) if blob is None else sha256(blob),
        "recipient": key_id,
        "wrapped": recipient.wrap(content_key, b"coterie wrap v1" + sha256(head) + key_id),
    }
    fields |= changes
    signed = head + b"".join(as_bytes(value, FIELDS[name][1]) for name, value in fields.items())
    return signed + sign(sender, signed)


def sign(sender: PartyKeys, signed: bytes) -> bytes:
    return sender.sign(b"coterie envelope v1", signed)


def flip(data: bytes, at: int, mask: int = 1) -> bytes:
    """One byte changed."""
    changed = bytearray(data)
    changed[at] ^= mask
    return bytes(changed)


def replaced(data: bytes, field: str, value) -> bytes:
    """One field of an envelope changed, its signature left as it is."""
    at, length = FIELDS[field]
    return data[:at] + as_bytes(value, length) + data[at + length :]


def made_blob(envelope_bytes: bytes, content_key: bytes, plaintext, slices, flips) -> bytes:
    """Slices of the honest ciphertext, one after another, with some bytes changed."""
    whole = encrypt(content_key, envelope_bytes[:HEADER], plaintext[0] * plaintext[1])
    blob = bytearray(b"".join(whole[start:end] for start, end in slices))
    for at in flips:
        blob[at] ^= 1
    return bytes(blob)
