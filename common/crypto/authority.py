"""The federation's own certificate authority, for TLS.

A root that stays offline signs an issuer; the issuer, which lies with the coordinator, signs leaves. TLS keys are not
identity keys: whoever takes the issuer can pose as a party to TLS, but neither sign nor open what parties seal for each
other.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from common.crypto.certificates import (
    COORDINATOR_DNS,
    FAULTS,
    URI,
    USAGES,
    CertificateRole,
    TlsKey,
    TlsPublicKey,
    decode_tls_key,
    encode_tls_key,
    generate_tls_key,
    subject_name,
)
from common.crypto.identity import NAME
from common.crypto.keys import write_private
from common.errors import KitError, RefusedError

CLOCK_SKEW = timedelta(days=1)
"""Certificates are valid from this long before they are made: clocks of organisations differ."""

_LEAF_LIFE, _ENROL_LIFE = timedelta(days=30), timedelta(hours=24)
_ISSUER_LIFE, _ROOT_LIFE = timedelta(days=5 * 365), timedelta(days=20 * 365)


@dataclass(frozen=True, kw_only=True, slots=True)
class Issuer:
    """What signs leaves; it can make no other authority.

    Attributes:
        federation: Whose leaves.
        certificate: Its own, PEM, signed by the root.
    """

    federation: str
    certificate: bytes
    _key: TlsKey = field(repr=False)

    def issue(
        self,
        public_key: TlsPublicKey,
        *,
        role: CertificateRole,
        name: str,
        hosts: Sequence[str] = (),
        life: timedelta | None = None,
    ) -> bytes:
        """Sign a leaf: the chain (leaf, then issuer) as PEM.

        Args:
            public_key: The holder's, P-256.
            role: What the holder may do.
            name: The party's name.
            hosts: Host names and addresses of a coordinator, beside `COORDINATOR_DNS`.
            life: How long it is valid; 30 days, or 24 hours for `enrol`. Never longer than the issuer is.

        Raises:
            RefusedError: The key is no P-256 key, a name is none, or hosts are named for another than a coordinator.
            KitError: The issuer has expired.
        """
        uri = f"coterie://{self.federation}/{role}/{name}"
        if not isinstance(public_key.curve, ec.SECP256R1) or not URI.fullmatch(uri):
            raise RefusedError(f"no certificate can be made for {role} {name!r}", hint="use P-256 and a plain name")
        if hosts and role != "coordinator":
            raise RefusedError("only a coordinator's certificate names hosts")
        issuer, now = x509.load_pem_x509_certificate(self.certificate), datetime.now(UTC)
        if now >= issuer.not_valid_after_utc:
            raise KitError("the federation's issuer has expired", hint="have the authority make a new issuer")
        life = life or (_ENROL_LIFE if role == "enrol" else _LEAF_LIFE)
        names = [COORDINATOR_DNS, *hosts] if role == "coordinator" else []
        alternative = [x509.UniformResourceIdentifier(uri), *map(_general_name, names)]
        leaf = (
            _builder(name, self.federation, public_key, issuer.subject, min(now + life, issuer.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([USAGES[role]]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .add_extension(_signed_by(self._key.public_key()), critical=False)
            .sign(self._key, SHA256())
        )
        return leaf.public_bytes(Encoding.PEM) + self.certificate

    def save(self, folder: Path) -> None:
        """Write `certificate.pem` and `private.pem`, for their owner only.

        Raises:
            KitError: They are there already, or cannot be written.
        """
        write_private(folder / "private.pem", encode_tls_key(self._key))
        write_private(folder / "certificate.pem", self.certificate)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            KitError: It is missing or damaged.
        """
        federation, certificate, key = _read_pair(folder / "certificate.pem", folder / "private.pem")
        return cls(federation=federation, certificate=certificate, _key=key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """A federation's root and its issuer. Only who provisions has this; a coordinator has the issuer.

    Attributes:
        federation: Name of the federation.
        root: The root's certificate, PEM: what every party trusts.
        issuer: What signs leaves.
    """

    federation: str
    root: bytes
    issuer: Issuer
    _key: TlsKey = field(repr=False)

    @classmethod
    def create(cls, federation: str) -> Self:
        """A new root with an issuer.

        Raises:
            RefusedError: The name is none.
        """
        if not re.fullmatch(NAME, federation):
            raise RefusedError(f"{federation!r} cannot be a federation's name", hint="use letters, digits, '-' and '_'")
        key = generate_tls_key()
        name = f"{federation} root"
        subject = subject_name(name, federation)
        root = (
            _builder(name, federation, key.public_key(), subject, datetime.now(UTC) + _ROOT_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(key, SHA256())
        )
        pem = root.public_bytes(Encoding.PEM)
        return cls(federation=federation, root=pem, issuer=_new_issuer(federation, root, key), _key=key)

    def with_new_issuer(self) -> Self:
        """The same root with another issuer: when one expires or is lost."""
        root = x509.load_pem_x509_certificate(self.root)
        issuer = _new_issuer(self.federation, root, self._key)
        return type(self)(federation=self.federation, root=self.root, issuer=issuer, _key=self._key)

    def save(self, folder: Path) -> None:
        """Write `root.pem`, `root-private.pem` and `issuer/`, for their owner only.

        Raises:
            KitError: They are there already, or cannot be written.
        """
        write_private(folder / "root-private.pem", encode_tls_key(self._key))
        write_private(folder / "root.pem", self.root)
        self.issuer.save(folder / "issuer")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            KitError: It is missing or damaged.
        """
        federation, root, key = _read_pair(folder / "root.pem", folder / "root-private.pem")
        return cls(federation=federation, root=root, issuer=Issuer.load(folder / "issuer"), _key=key)


def _new_issuer(federation: str, root: x509.Certificate, root_key: TlsKey) -> Issuer:
    key = generate_tls_key()
    end = min(datetime.now(UTC) + _ISSUER_LIFE, root.not_valid_after_utc)
    certificate = (
        _builder(f"{federation} issuer", federation, key.public_key(), root.subject, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(_signed_by(root_key.public_key()), critical=False)
        .sign(root_key, SHA256())
    )
    return Issuer(federation=federation, certificate=certificate.public_bytes(Encoding.PEM), _key=key)


def _builder(
    common_name: str, federation: str, public_key: TlsPublicKey, issuer: x509.Name, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject_name(common_name, federation))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _signed_by(public_key: TlsPublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)


def _general_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host)
    except ValueError as e:
        raise RefusedError(f"{host!r} is no host name", hint="write international names in their ASCII form") from e


def _read_pair(certificate_file: Path, key_file: Path) -> tuple[str, bytes, TlsKey]:
    """A federation's name, the certificate of one of its authorities, and that one's key.

    Raises:
        KitError: A file is missing or damaged, or they do not belong together.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        (federation,) = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        key = decode_tls_key(key_file.read_bytes())
        if certificate.public_key() != key.public_key():
            raise ValueError
    except (OSError, *FAULTS) as e:
        raise KitError(f"{certificate_file} or its key is missing or damaged", hint="restore both") from e
    return str(federation.value), certificate.public_bytes(Encoding.PEM), key
