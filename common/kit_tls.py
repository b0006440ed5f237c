"""The TLS part of a kit: a certificate, its key, and the federation's root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from common.crypto import decode_tls_key
from common.errors import CoterieError, KitError

ROOT = "ca.pem"
CHAIN, TLS_KEY, NEXT_TLS_KEY = "tls/chain.pem", "tls/private.pem", "tls/next.pem"
"""`next.pem` is the key of a certificate that was asked for; it takes the place of `private.pem` when that comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """What mutual TLS needs, as PEM: own certificate and issuer, own key, the federation's root."""

    chain: bytes
    key: bytes = field(repr=False)
    root: bytes


def read_tls(folder: Path) -> Tls:
    """Certificate and key as they are now, also where a renewal was interrupted between the two files.

    Raises:
        KitError: A file is missing, or no key fits the certificate.
    """
    root = read(folder / ROOT)
    chain = None
    while (found := read(folder / CHAIN)) != chain:  # looked at again where a renewal came between
        chain = found
        for name in (TLS_KEY, NEXT_TLS_KEY, TLS_KEY):  # twice: a renewal may just have put the next one in its place
            key = _found(folder / name)
            if key is not None and _belongs(key, folder / name, chain):
                return Tls(chain=chain, key=key, root=root)
    if not (folder / TLS_KEY).exists():
        read(folder / TLS_KEY)
    raise KitError(
        f"{folder / TLS_KEY} is not the key of {folder / CHAIN}", hint="restore both from the kit's archive, or enrol"
    )


def fits(key_path: Path, chain: bytes) -> bool:
    """Whether a private key belongs to the first certificate of a chain.

    Raises:
        KitError: One of them is damaged.
    """
    return _belongs(read(key_path), key_path, chain)


def _belongs(text: bytes, path: Path, chain: bytes) -> bool:
    """Whether a key, which was read from `path`, is that of a chain's first certificate."""
    with damage(path):
        key = decode_tls_key(text)
    with damage(path.parent / Path(CHAIN).name):
        certificate = x509.load_pem_x509_certificate(chain)
        return certificate.public_key() == key.public_key()


def _found(path: Path) -> bytes | None:
    """What is in a file, or None where there is none (any more)."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return read(path)


def verify_chain(chain: bytes, root: bytes) -> None:
    """Refuse a certificate that the root did not sign, by way of its issuer. Times are not looked at.

    Raises:
        ValueError, TypeError, InvalidSignature: As `cryptography` says it.
    """
    certificates = [*x509.load_pem_x509_certificates(chain), x509.load_pem_x509_certificate(root)]
    for below, above in pairwise(certificates):
        below.verify_directly_issued_by(above)


def read(path: Path) -> bytes:
    """A file of a kit.

    Raises:
        KitError: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as e:
        raise KitError(f"{path} is missing", hint="restore it from the kit's archive") from e
    except OSError as e:
        raise KitError(f"{path} cannot be read: {e.strerror}", hint=f"is it this user's ({os.getuid()}) kit?") from e


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn whatever a parser says of a file into one KitError that names it; other text might quote a key."""
    try:
        yield
    except KitError as e:
        if str(path.parent) in str(e):
            raise
        raise KitError(f"{path}: {e}", hint=e.hint) from e
    except (CoterieError, ValueError, TypeError, InvalidSignature) as e:
        reason = f": {e}" if isinstance(e, CoterieError) else ""
        raise KitError(f"{path} is damaged{reason}", hint="restore it from the kit's archive") from e
