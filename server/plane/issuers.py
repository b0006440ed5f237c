"""Whose signature a certificate must have: the issuer in the coordinator's kit, and older ones beside it.

TLS accepts whatever the root vouches for, which a stolen issuer is for five years. This is how it ends sooner.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from common.kit import ISSUER
from server.plane.files import Signature, signature

CERTIFICATE: Final = "certificate.pem"


class Issuers:
    """The issuers in a kit, as they are at every question. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[tuple[str, Signature | None], ...] = ()
        self._certificates: tuple[bytes, ...] = ()

    def state(self) -> tuple[tuple[str, Signature | None], ...]:
        """What changes when an issuer comes or goes."""
        paths = [self._folder / ISSUER, *sorted(self._folder.glob(f"{ISSUER}.old-*"))]
        return tuple((path.name, signature(path / CERTIFICATE)) for path in paths)

    def signed(self, leaf: bytes) -> bool:
        """Whether one of them signed a certificate, PEM. Where none can be read nobody has."""
        now = self.state()
        with self._lock:
            if now != self._seen:
                self._certificates = tuple(self._read(name) for name, _ in now)
                self._seen = now
            certificates = self._certificates
        return any(_signed(leaf, issuer) for issuer in certificates)

    def _read(self, name: str) -> bytes:
        try:
            return (self._folder / name / CERTIFICATE).read_bytes()
        except OSError:
            return b""


@lru_cache(maxsize=4096)
def _signed(leaf: bytes, issuer: bytes) -> bool:
    try:
        x509.load_pem_x509_certificate(leaf).verify_directly_issued_by(x509.load_pem_x509_certificate(issuer))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
