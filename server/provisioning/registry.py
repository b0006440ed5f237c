"""Where certificates are issued: the authority's folder, or the coordinator's kit. Both hold an issuer and the pins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from common.crypto import CertificateRole, Issuer, PeerIdentity, peer_identity
from common.errors import KitError
from common.kit import ISSUER, KitFacts, check_secrets, read_facts, read_pins
from common.kit_tls import ROOT, read
from common.pins import Pins

ISSUED = "issued.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """An issuer, and the folder that keeps account of what it signed."""

    folder: Path
    facts: KitFacts
    issuer: Issuer
    root: bytes

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The registry of a folder.

        Raises:
            KitError: The folder has no issuer, or something in it is damaged.
        """
        facts = read_facts(folder)
        if facts.role not in {"authority", "coordinator"}:
            raise KitError(
                f"{folder} is the kit of {facts.role} `{facts.name}`: it cannot issue certificates",
                hint="use the coordinator's kit, or the authority's folder",
            )
        check_secrets(folder)
        issuer = Issuer.load(folder / ISSUER)
        if issuer.federation != facts.federation:
            raise KitError(f"{folder / ISSUER} is another federation's", hint="restore it from the kit's archive")
        return cls(folder=folder, facts=facts, issuer=issuer, root=read(folder / ROOT))

    def pins(self) -> Pins:
        """Every party's public record, as on the disk now."""
        return read_pins(self.folder)

    def issue(
        self,
        public_key: EllipticCurvePublicKey,
        *,
        role: CertificateRole,
        name: str,
        hosts: Sequence[str] = (),
        life: timedelta | None = None,
    ) -> bytes:
        """Sign a certificate and write down that it was: the chain, as PEM.

        Raises:
            RefusedError: The name or the key cannot have a certificate.
            KitError: The issuer has expired, or the account cannot be written.
        """
        chain = self.issuer.issue(public_key, role=role, name=name, hosts=hosts, life=life)
        identity = peer_identity(chain)
        record(self.folder, identity)
        return chain

    def unexpired(self, *, now: datetime | None = None) -> dict[str, list[PeerIdentity]]:
        """Every certificate of each party that is good by its dates, newest last; those of tokens are left out."""
        moment, found = now or datetime.now(UTC), dict[str, list[PeerIdentity]]()
        for identity in _issued(self.folder):
            if identity.role != "enrol" and identity.not_after > moment:
                found.setdefault(identity.name, []).append(identity)
        return found

    def newest(self) -> dict[str, PeerIdentity]:
        """The certificate of each party that is valid longest; those of tokens are left out."""
        found: dict[str, PeerIdentity] = {}
        for identity in _issued(self.folder):
            known = found.get(identity.name)
            if identity.role != "enrol" and (known is None or identity.not_after >= known.not_after):
                found[identity.name] = identity
        return found


def record(folder: Path, identity: PeerIdentity) -> None:
    """Write down a certificate that was issued.

    Raises:
        KitError: The account cannot be written.
    """
    document = {
        "name": identity.name,
        "role": identity.role,
        "serial": f"{identity.serial:x}",
        "not_before": identity.not_before.isoformat(),
        "not_after": identity.not_after.isoformat(),
    }
    path = folder / ISSUED
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(descriptor, "ab") as file:
            file.write(json.dumps(document).encode() + b"\n")
    except OSError as e:
        raise KitError(f"{path} cannot be written: {e.strerror}", hint="check the disk and its permissions") from e


def _issued(folder: Path) -> list[PeerIdentity]:
    """All lines that can be read: a torn one, after a power cut, is no reason to stop."""
    path = folder / ISSUED
    if not path.exists():
        return []
    federation, found = read_facts(folder).federation, []
    for line in read(path).decode(errors="replace").splitlines():
        try:
            fields: dict[str, Any] = json.loads(line)
            found.append(
                PeerIdentity(
                    federation=federation,
                    role=fields["role"],
                    name=fields["name"],
                    serial=int(fields["serial"], 16),
                    not_before=datetime.fromisoformat(fields["not_before"]),
                    not_after=datetime.fromisoformat(fields["not_after"]),
                )
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found
