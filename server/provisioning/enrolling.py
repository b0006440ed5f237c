"""Answers to parties that made their keys themselves: enrolment by request or token, renewal.

Of a CSR only the public key is taken. Names and roles come from a token, from the presented certificate, or from a
record whose owner signed the request.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from pydantic import ValidationError

from common.crypto import PartyRecord, PeerIdentity, read_csr
from common.enrolment import Answer, Request
from common.errors import RefusedError
from common.kit import Kit
from common.kit_files import add_pins_locked, begin_renewal, install_certificate, locked
from common.pins import Pins
from server.provisioning.denied import DENIED, Denied
from server.provisioning.registry import Registry
from server.provisioning.settings import host_of
from server.provisioning.tokens import coordinator_registry, good_token, mark_used

MOST_CERTIFICATES: Final = 32
"""That a party may hold at once by renewal. It needs two; more is somebody who fills the disk. `sign` gives more."""


def enrol(kit: Kit, identity: PeerIdentity, csr_pem: bytes, record_json: str, signature: bytes) -> tuple[bytes, str]:
    """Make the holder of a token a party: its certificate chain, and everybody's public records.

    Guarantee: A token makes one party, also where several ask at the same time. No pinned record changes. Where this
    raises, nothing has changed.

    Args:
        kit: The coordinator's.
        identity: What TLS verified: the token's certificate.
        csr_pem: Request of the new party.
        record_json: Its public record.
        signature: By the record's own keys, over both.

    Raises:
        RefusedError: The token was used, has expired, or is for another name; the name is taken; the record's role or
            suite is another; or request and signature are not sound.
        KitError: The kit cannot be read or written.
    """
    if identity.role != "enrol" or identity.federation != kit.federation:
        raise RefusedError("only a token's certificate can enrol")
    request = _request(kit.federation, csr_pem, record_json, signature)
    record, public_key = request.check(), read_csr(csr_pem)
    registry = coordinator_registry(kit.folder)
    _refuse_denied(registry, identity)
    with locked(kit.folder):
        token, pins = good_token(kit.folder, identity), registry.pins()
        if (record.name, record.role) != (token.name, token.role):
            raise RefusedError(f"the token is for {token.role} `{token.name}`, the request for another")
        check_new(pins, record)
        chain = registry.issue(public_key, role=record.role, name=record.name)
        mark_used(kit.folder, token)  # first: an interruption costs the token, and never gives it out twice
        add_pins_locked(kit.folder, [record])
        return chain, registry.pins().to_text()


def renew(kit: Kit, identity: PeerIdentity, csr_pem: bytes) -> bytes:
    """A new certificate for whoever holds a valid one: same name, same role, the key of this request.

    Raises:
        RefusedError: The holder is shut out, is no party any more, has had too many of late, or the request is not
            sound.
        KitError: The kit cannot be read.
    """
    public_key, registry = read_csr(csr_pem), coordinator_registry(kit.folder)
    _refuse_denied(registry, identity)
    pinned = registry.pins().find(identity.name)
    if identity.federation != kit.federation or pinned is None or pinned.role != identity.role:
        raise RefusedError(f"{identity.role} `{identity.name}` is no party of this federation")
    with locked(kit.folder):
        denied = Denied(kit.folder / DENIED)
        good = [each for each in registry.unexpired().get(pinned.name, ()) if not denied.refuses(each)]
        if len(good) >= MOST_CERTIFICATES:
            raise RefusedError(f"`{pinned.name}` has {MOST_CERTIFICATES} certificates that are good")
        return registry.issue(public_key, role=pinned.role, name=pinned.name, hosts=_hosts(registry, pinned))


def renew_own(kit: Kit, *, now: datetime | None = None) -> bool:
    """Renew the coordinator's own certificate where a third of its life or less is left; whether it was.

    Raises:
        KitError: The kit cannot be read or written, or the issuer has expired.
    """
    if (now or datetime.now(UTC)) < kit.certificate().renew_at:
        return False
    registry = coordinator_registry(kit.folder)
    public_key = read_csr(begin_renewal(kit.folder))
    hosts = [host_of(registry.facts.server)]
    install_certificate(kit.folder, registry.issue(public_key, role="coordinator", name=kit.name, hosts=hosts))
    return True


def sign(registry: Registry, request: Request) -> tuple[Answer, bool]:
    """Answer a request that came as a file; and whether it is a new party that was pinned.

    A party that is pinned with the very keys that signed gets a new certificate: it may have expired, or its key is
    lost.

    Raises:
        RefusedError: The request is for another federation, for a name that others have, or not sound.
        KitError: The registry cannot be written.
    """
    if request.federation != registry.facts.federation:
        raise RefusedError(
            f"the request is for federation `{request.federation}`, not `{registry.facts.federation}`",
            hint="`coterie enroll NAME --federation` takes the federation's name",
        )
    record, public_key = request.check(), read_csr(request.csr.encode())
    if Denied(registry.folder / DENIED).refuses_name(record.name):
        raise RefusedError(f"`{record.name}` is on the deny list", hint="`coterie provision allow` takes it off")
    with locked(registry.folder):
        pins = registry.pins()
        known = pins.find(record.name) == record and record.role != "coordinator"
        if not known:
            check_new(pins, record)
        chain = registry.issue(public_key, role=record.role, name=record.name)
        add_pins_locked(registry.folder, [record])
        answer = Answer(
            federation=registry.facts.federation,
            name=record.name,
            server=registry.facts.server,
            chain=chain.decode("ascii"),
            root=registry.root.decode("ascii"),
            parties=registry.pins().to_text(),
        )
    return answer, not known


def check_new(pins: Pins, record: PartyRecord) -> None:
    """Refuse a record that cannot join.

    Raises:
        RefusedError: Its name is taken, it wants to be the coordinator, or it signs otherwise than this federation.
    """
    if pins.taken(record.name):
        raise RefusedError(
            f"`{record.name}` is a party already, with other keys; a pinned record is never replaced",
            hint="a party that lost its keys comes back under a new name",
        )
    if record.role == "coordinator":
        raise RefusedError("a federation has one coordinator", hint="ask as a site or as an operator")
    if record.suite is not pins.coordinator.suite:
        wanted = pins.coordinator.suite.name.lower().replace("_", "-")
        raise RefusedError(
            f"the record of `{record.name}` signs with another suite than the federation ({wanted})",
            hint="`coterie enroll --suite` chooses it",
        )


def _request(federation: str, csr_pem: bytes, record_json: str, signature: bytes) -> Request:
    try:
        csr = csr_pem.decode("ascii")
        return Request(federation=federation, csr=csr, record=record_json, signature=signature.hex())
    except (UnicodeDecodeError, ValidationError) as e:
        raise RefusedError("an enrolment request is damaged") from e


def _refuse_denied(registry: Registry, identity: PeerIdentity) -> None:
    if Denied(registry.folder / DENIED).refuses(identity):
        raise RefusedError(f"{identity.role} `{identity.name}` is on the deny list")


def _hosts(registry: Registry, record: PartyRecord) -> list[str]:
    return [host_of(registry.facts.server)] if record.role == "coordinator" else []
