"""Who may call what: the identity that TLS verified, its role, the pinned records and the deny list."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from common.crypto import CertificateRole, PeerIdentity, peer_identity
from common.errors import RefusedError
from common.kit import PARTIES, Kit
from common.pins import Pins
from common.transport.wire import Refusal
from server.plane.files import signature
from server.plane.issuers import Issuers
from server.plane.refusals import RefusedCallError
from server.provisioning import Denied
from server.provisioning.denied import DENIED


class Admission:
    """Decides at every call, by the kit's files as they are then. Thread-safe.

    Guarantee: who is let in has a leaf of this federation that has not expired, is signed by an issuer in the kit, is
    not on the deny list, and, unless it came with a token to enrol, is pinned under that name and role.
    """

    def __init__(self, kit: Kit, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._kit, self._now = kit, now
        self._denied = Denied(kit.folder / DENIED)
        self._issuers = Issuers(kit.folder)
        self._lock = threading.Lock()
        self._seen = signature(kit.folder / PARTIES)
        self._pins = kit.pins()

    def certificate(self, auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
        """What a connection showed.

        Raises:
            RefusedCallError: Nothing, or no issuer that is still used signed it.
        """
        certificates = list(auth_context.get("x509_pem_cert", ()))
        if len(certificates) != 1 or not self.issued(certificates[0]):
            raise RefusedCallError(Refusal.DENIED)
        return certificates[0]

    def identify(self, certificate: bytes) -> PeerIdentity:
        """Whom a connection belongs to.

        Raises:
            RefusedCallError: Its certificate does not say.
        """
        try:
            return peer_identity(certificate)
        except RefusedError as e:
            raise RefusedCallError(Refusal.DENIED) from e

    def issued(self, certificate: bytes) -> bool:
        """Whether an issuer signed a certificate that is still used."""
        return self._issuers.signed(certificate)

    def check(self, identity: PeerIdentity, roles: frozenset[CertificateRole]) -> None:
        """Let a party of one of these roles pass.

        Raises:
            RefusedCallError: `denied`, without saying why.
        """
        if identity.role not in roles or not self.current(identity):
            raise RefusedCallError(Refusal.DENIED)

    def current(self, identity: PeerIdentity) -> bool:
        """Whether a certificate is good now."""
        return (
            identity.federation == self._kit.federation
            and self._now() < identity.not_after
            and not self._denied.refuses(identity)
            and (identity.role == "enrol" or self._is_pinned(identity))
        )

    def expired(self, identity: PeerIdentity) -> bool:
        """Whether a certificate has only run out: the party may come back with a newer one."""
        return self._now() >= identity.not_after

    def state(self) -> object:
        """What changes when somebody is denied, let in again, or pinned, or an issuer comes or goes."""
        return signature(self._kit.folder / DENIED), signature(self._kit.folder / PARTIES), self._issuers.state()

    def denied_sites(self) -> list[str]:
        """Pinned sites that are shut out under their name."""
        return [name for name in self.pins().sites if self._denied.refuses_name(name)]

    def pins(self) -> Pins:
        """The pinned records, read again when their file has changed: an enrolment counts at once.

        Raises:
            KitError: The file is damaged.
        """
        now = signature(self._kit.folder / PARTIES)
        with self._lock:
            if now != self._seen:
                self._pins, self._seen = self._kit.pins(), now
            return self._pins

    def _is_pinned(self, identity: PeerIdentity) -> bool:
        record = self.pins().find(identity.name)
        return record is not None and record.role == identity.role
