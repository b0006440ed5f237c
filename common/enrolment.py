"""How a party joins a federation with keys that it made itself: request, answer, one-time token, fingerprints.

A request holds a CSR and the party's public record, signed with the record's own keys: whoever sends it has them. An
answer holds the certificate and everybody's public records. Both are public; what they need is that nobody exchanges
them on the way, so two people compare fingerprints. A token is secret: it holds the key of a certificate that is good
for one enrolment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from common.crypto import PartyKeys, PartyRecord, Suite
from common.errors import RefusedError
from common.pins import Pins

SUITES = {"ed25519": Suite.ED25519, "ed25519+ml-dsa-65": Suite.ED25519_ML_DSA_65}
LARGEST_REQUEST = 64 << 10
_LABEL = b"coterie enrolment request v1"
_FINGERPRINT_LABEL = b"coterie federation fingerprint v2"
_TOKEN_PREFIX = "coterie-token-1."  # noqa: S105 - the name of a format
_LARGEST_FILE = 8 << 20


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a file's text.

        Raises:
            RefusedError: It is something else, or damaged. The text is not quoted: it may hold a key.
        """
        name = cls.__name__.lower()
        try:
            if len(text) > _LARGEST_FILE:
                raise ValueError
            return cls.model_validate_json(text)
        except (ValueError, RecursionError):
            raise RefusedError(f"this is no enrolment {name}, or it is damaged", hint="send it again, whole") from None

    def to_text(self) -> str:
        """JSON, on one line."""
        return self.model_dump_json() + "\n"


class Request(_File):
    """What a party asks with. Nothing in it is secret."""

    kind: Literal["coterie-enrolment-request"] = "coterie-enrolment-request"
    format: Literal[1] = 1
    federation: str
    csr: str
    record: str = Field(description="JSON of the public record; the very text is signed.")
    signature: str = Field(pattern="^(?:[0-9a-f]{2})+$")

    @classmethod
    def of(cls, keys: PartyKeys, *, federation: str, csr_pem: bytes) -> Self:
        """A request, signed."""
        csr, record = csr_pem.decode("ascii"), json.dumps(keys.record.to_document())
        signature = keys.sign(_LABEL, _signed(federation, csr, record))
        return cls(federation=federation, csr=csr, record=record, signature=signature.hex())

    def check(self) -> PartyRecord:
        """The record that asks, its signature verified.

        Raises:
            RefusedError: The record is not sound, or the signature is not by its keys over this request.
        """
        if max(len(self.csr), len(self.record)) > LARGEST_REQUEST:
            raise RefusedError("the enrolment request is too large", hint="`coterie enroll` writes requests")
        try:
            document: Any = json.loads(self.record)
        except (ValueError, RecursionError) as e:
            raise RefusedError("the record of the enrolment request is not JSON", hint="send it again, whole") from e
        if not isinstance(document, dict):
            raise RefusedError("the record of the enrolment request is no document", hint="send it again, whole")
        record = PartyRecord.from_document(document)
        record.verify(_LABEL, _signed(self.federation, self.csr, self.record), bytes.fromhex(self.signature))
        return record


class Answer(_File):
    """What completes a kit. Nothing in it is secret."""

    kind: Literal["coterie-enrolment-answer"] = "coterie-enrolment-answer"
    format: Literal[1] = 1
    federation: str
    name: str
    server: str
    chain: str
    root: str
    parties: str


class Token(_File):
    """A certificate for one enrolment, with its key. Whoever has it can take the name that it is for."""

    federation: str
    server: str
    name: str
    role: Literal["site", "operator"]
    suite: Literal["ed25519", "ed25519+ml-dsa-65"]
    coordinator: str = Field(description="Hex key id of the coordinator's record: what comes back must hold it.")
    parties: list[str] = Field(description="Hex key ids of everybody else: of what comes back, others are not pinned.")
    chain: str
    key: SecretStr
    root: str

    def encode(self) -> str:
        """One line of text."""
        document = self.model_dump() | {"key": self.key.get_secret_value()}
        return _TOKEN_PREFIX + base64.urlsafe_b64encode(json.dumps(document).encode()).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read a token.

        Raises:
            RefusedError: The text is no token, or not all of it.
        """
        prefix, body = text.strip()[: len(_TOKEN_PREFIX)], text.strip()[len(_TOKEN_PREFIX) :]
        try:
            if prefix != _TOKEN_PREFIX:
                raise ValueError
            return cls.from_text(base64.b64decode(body, altchars=b"-_", validate=True).decode())
        except (ValueError, binascii.Error, RefusedError):
            raise RefusedError(
                "this is no enrolment token, or not all of it", hint="`coterie provision token NAME` makes one"
            ) from None


def read_text(path: Path) -> str:
    """The text of a request, an answer or a token.

    Raises:
        RefusedError: The file cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise RefusedError(f"{path} cannot be read: {e.strerror}", hint="check the path and its permissions") from e
    except UnicodeDecodeError as e:
        raise RefusedError(f"{path} is not text", hint="send it again, whole") from e


def record_fingerprint(record: PartyRecord) -> str:
    """What two people read to each other to know that they have the same public record: 128 bits in groups."""
    return _groups(record.key_id)


def federation_fingerprint(root_pem: bytes, pins: Pins) -> str:
    """The same for a federation: its root certificate, and the record of everybody who belongs to it.

    Operators and sites count as well: whoever is pinned is trusted, an operator with what a site computes.

    Raises:
        RefusedError: The root is no certificate.
    """
    try:
        root = x509.load_pem_x509_certificate(root_pem).public_bytes(Encoding.DER)
    except ValueError as e:
        raise RefusedError("the root is no certificate", hint="send the answer again, whole") from e
    everybody = b"".join(sorted(record.key_id for record in pins.records()))  # an id covers name and role
    return _groups(hashlib.sha256(_FINGERPRINT_LABEL + hashlib.sha256(root).digest() + everybody).digest())


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are equal, however they are spaced."""
    return "".join(one.split()).lower() == "".join(other.split()).lower()


def _groups(digest: bytes) -> str:
    text = digest[:16].hex()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def _signed(federation: str, csr: str, record: str) -> bytes:
    """Everything that a request says, each part after its length."""
    parts = (federation.encode(), csr.encode(), record.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
