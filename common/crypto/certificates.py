"""TLS certificates as every party sees them: its own key and request, and whom a peer's certificate belongs to.

Who a leaf belongs to stands in its one URI, `coterie://<federation>/<role>/<name>`; what it may be used for, in its
extended key usage. `authority` makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal, cast, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.crypto.identity import NAME
from common.errors import KitError, RefusedError

CertificateRole = Literal["coordinator", "site", "operator", "enrol"]
"""A party's role, or `enrol`: the short-lived certificate that comes with a one-time token."""

COORDINATOR_DNS = "coordinator.coterie.internal"
"""A name that only the coordinator's certificate has, whatever its address."""

TlsKey = ec.EllipticCurvePrivateKey
TlsPublicKey = ec.EllipticCurvePublicKey

USAGES = {
    "coordinator": ExtendedKeyUsageOID.SERVER_AUTH,
    "site": ExtendedKeyUsageOID.CLIENT_AUTH,
    "operator": ExtendedKeyUsageOID.CLIENT_AUTH,
    "enrol": ExtendedKeyUsageOID.CLIENT_AUTH,
}
"""The extended key usage of each role: only the coordinator can be a TLS server, and it can be nothing else."""

URI = re.compile(rf"coterie://({NAME})/({'|'.join(get_args(CertificateRole))})/({NAME})")

FAULTS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""All that reading a damaged certificate, request or key can raise."""

_MOST_PEM_BYTES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerIdentity:
    """Whom a leaf certificate belongs to. TLS has verified its chain and its times.

    Attributes:
        federation: Name of the federation.
        role: What the holder may do.
        name: Name of the party.
        serial: The certificate's number.
        not_before: From when it is valid.
        not_after: Until when it is valid.
    """

    federation: str
    role: CertificateRole
    name: str
    serial: int
    not_before: datetime
    not_after: datetime

    @property
    def renew_at(self) -> datetime:
        """When a third of its life is left."""
        return self.not_after - (self.not_after - self.not_before) / 3


def generate_tls_key() -> TlsKey:
    """A new P-256 key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def encode_tls_key(key: TlsKey) -> bytes:
    """A TLS key as unencrypted PEM, for a file that only its owner can read."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def decode_tls_key(pem: bytes) -> TlsKey:
    """Read `encode_tls_key`.

    Raises:
        KitError: It is no P-256 key.
    """
    try:
        key = load_pem_private_key(pem, None)
    except FAULTS as e:
        raise KitError("a TLS key is damaged", hint="restore it, or have a new kit made") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KitError("a TLS key is not a P-256 key", hint="restore it, or have a new kit made")
    return key


def make_csr(key: TlsKey, *, federation: str, role: CertificateRole, name: str) -> bytes:
    """A request for a certificate, PEM. The names are for people who look at it; who signs it takes the key alone."""
    subject = subject_name(f"{role} {name}", federation)
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_csr(pem: bytes) -> TlsPublicKey:
    """The public key of a request, and only that: names and extensions in it are never looked at.

    Raises:
        RefusedError: It is no request, not signed by its own key, or not for a P-256 key.
    """
    try:
        if len(pem) > _MOST_PEM_BYTES:
            raise ValueError
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise TypeError
        if not request.is_signature_valid:
            raise ValueError
    except FAULTS as e:
        raise RefusedError("a certificate request is damaged, or not for a P-256 key") from e
    return key


@lru_cache(maxsize=4096)
def peer_identity(pem: bytes) -> PeerIdentity:
    """Whom a leaf certificate, verified by TLS, belongs to.

    Guarantee:
        It has exactly one URI, and its extended key usage is the one of its role and no other.

    Raises:
        RefusedError: It is not such a leaf.
    """
    try:
        if len(pem) > _MOST_PEM_BYTES:
            raise ValueError
        certificate = x509.load_pem_x509_certificate(pem)
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        match = URI.fullmatch(uri)
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        if match is None or authority:
            raise ValueError
        federation, role, name = match.groups()
        if usages != [USAGES[role]]:
            raise ValueError
    except FAULTS as e:
        raise RefusedError("a certificate does not say which party it belongs to") from e
    return PeerIdentity(
        federation=federation,
        role=cast("CertificateRole", role),
        name=name,
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def subject_name(common_name: str, federation: str) -> x509.Name:
    """A subject for people to read; X.509 allows 64 characters."""
    attributes = [(NameOID.ORGANIZATION_NAME, federation), (NameOID.COMMON_NAME, common_name[:64])]
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])
