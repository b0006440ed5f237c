"""Who a party is: the public record that others pin.

Signatures are Ed25519, with ML-DSA-65 beside it where the record says so; keys are wrapped by HPKE with ML-KEM-768 and
X25519 together. TLS has keys of its own (`certificates`). Which suite a party uses stands in its pinned record and is
never negotiated.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.crypto.refusal import SealError
from common.errors import RefusedError

Role = Literal["coordinator", "site", "operator"]

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""What a party or a federation can be called: nothing that has a meaning in a path or a URI."""

Name = Annotated[str, Field(pattern=rf"^{NAME}$")]

HPKE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
WRAP_BYTES = 1120 + 32 + 16  # encapsulated keys, the wrapped key, its tag
KEY_ID_BYTES = 32
"""Length of `PartyRecord.key_id`."""

_ED25519_BYTES, _ML_DSA_BYTES = 64, 3309
_ML_DSA_PUBLIC_BYTES = 1952
_KEY_FIELDS = ("ed25519", "ml_dsa", "ml_kem", "x25519")
_KEY_ID_LABEL, _SIGNATURE_LABEL = b"coterie key id v1", b"coterie signature v1"


class Suite(IntEnum):
    """What a party signs with."""

    ED25519 = 1
    ED25519_ML_DSA_65 = 2

    @property
    def signature_bytes(self) -> int:
        """Length of a signature."""
        return _ED25519_BYTES if self is Suite.ED25519 else _ED25519_BYTES + _ML_DSA_BYTES


class _Document(BaseModel):
    """A public record as JSON holds it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    name: Name
    role: Role
    suite: Literal[1, 2]
    ed25519: str
    ml_dsa: str
    ml_kem: str
    x25519: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyRecord:
    """What is public about a party, and what others pin.

    Attributes:
        name: Its name in the federation.
        role: What it may do.
        suite: What it signs with.
        ed25519: Public key, 32 bytes.
        ml_dsa: Public ML-DSA-65 key, 1952 bytes; empty without it.
        ml_kem: Public ML-KEM-768 key, 1184 bytes.
        x25519: Public key, 32 bytes.
    """

    name: str
    role: Role
    suite: Suite
    ed25519: bytes = field(repr=False)
    ml_dsa: bytes = field(repr=False)
    ml_kem: bytes = field(repr=False)
    x25519: bytes = field(repr=False)

    @property
    def key_id(self) -> bytes:
        """SHA-256 over every field: two names, roles or suites never share one, even with the same keys."""
        said = [self.name.encode(), self.role.encode(), bytes([self.suite])]
        fields = [*said, self.ed25519, self.ml_dsa, self.ml_kem, self.x25519]
        return hashlib.sha256(_KEY_ID_LABEL + b"".join(len(f).to_bytes(4, "big") + f for f in fields)).digest()

    def to_document(self) -> dict[str, Any]:
        """The record for a JSON file."""
        keys = {name: base64.b64encode(getattr(self, name)).decode() for name in _KEY_FIELDS}
        return {"version": 1, "name": self.name, "role": self.role, "suite": int(self.suite), **keys}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read `to_document`.

        Raises:
            RefusedError: It is not a record, or a key in it is not one.
        """
        try:
            fields = _Document.model_validate(dict(document))
            keys = {name: base64.b64decode(getattr(fields, name), validate=True) for name in _KEY_FIELDS}
            record = cls(name=fields.name, role=fields.role, suite=Suite(fields.suite), **keys)
            record.check()
        except (ValidationError, ValueError, TypeError, RecursionError, SealError) as e:
            raise RefusedError("a party's public record is damaged", hint="ask that party for it again") from e
        return record

    def check(self) -> None:
        """Look at every key.

        Raises:
            ValueError: One is not a key of its kind.
            SealError: `wrap`: nothing can be encrypted to this party.
        """
        if len(self.ml_dsa) != (0 if self.suite is Suite.ED25519 else _ML_DSA_PUBLIC_BYTES):
            raise ValueError("the ML-DSA key does not fit the suite")
        Ed25519PublicKey.from_public_bytes(self.ed25519)
        if self.ml_dsa:
            MLDSA65PublicKey.from_public_bytes(self.ml_dsa)
        self.wrap(bytes(32), b"")  # an X25519 key that agrees on nothing shows only in use

    def verify(self, label: bytes, message: bytes, signature: bytes) -> None:
        """Check a signature of this party; every signature that its suite has must be there and fit.

        Raises:
            SealError: `signature`.
        """
        if len(signature) != self.suite.signature_bytes:
            raise SealError("signature")
        signed = signed_bytes(self.key_id, label, message)
        try:
            Ed25519PublicKey.from_public_bytes(self.ed25519).verify(signature[:_ED25519_BYTES], signed)
            if self.suite is not Suite.ED25519:
                MLDSA65PublicKey.from_public_bytes(self.ml_dsa).verify(signature[_ED25519_BYTES:], signed)
        except (InvalidSignature, ValueError) as e:
            raise SealError("signature") from e

    def wrap(self, key: bytes, info: bytes) -> bytes:
        """Encrypt a 32-byte key to this party, bound to `info`.

        Raises:
            SealError: `wrap`: no key can be agreed with this party's public key.
        """
        try:
            return HPKE.encrypt(key, self._wrapping_key(), info)
        except ValueError as e:
            raise SealError("wrap") from e

    def _wrapping_key(self) -> hpke.MLKEM768X25519PublicKey:
        ml_kem = MLKEM768PublicKey.from_public_bytes(self.ml_kem)
        return hpke.MLKEM768X25519PublicKey(ml_kem, X25519PublicKey.from_public_bytes(self.x25519))


def signed_bytes(key_id: bytes, label: bytes, message: bytes) -> bytes:
    """What is signed: bound to the signer's whole record, so that no other key or suite can claim the signature."""
    return _SIGNATURE_LABEL + key_id + len(label).to_bytes(1, "big") + label + message
