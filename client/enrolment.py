"""Joining a federation with keys that are made here: by request and answer, or with a one-time token over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from common.crypto import PartyKeys
from common.disk import disk_errors
from common.enrolment import SUITES, Answer, Request, Token, federation_fingerprint, same_fingerprint
from common.errors import KitError, RefusedError, UnreachableError
from common.kit import IDENTITY, PARTIES, UNCONFIRMED, KitFacts, check_secrets, party_role, read_facts, read_pins
from common.kit_files import begin_kit, begin_renewal, complete_kit, new_folder, put
from common.kit_tls import CHAIN, ROOT, Tls, read
from common.pins import Pins

REQUEST = "request.json"
_TIMEOUT_SECONDS = 60.0
_AGAIN = "`coterie enroll --kit {0}` writes a request, which `coterie provision sign` answers"


def begin(out: Path, *, federation: str, name: str, role: Literal["site", "operator"], suite: str) -> Request:
    """Make a kit with new keys that waits for its certificate; the request, which is also in the kit.

    Guarantee: The private keys are in the new folder, and nowhere else.

    Raises:
        KitError: There is something at `out`, or it cannot be written.
    """
    facts = KitFacts(federation=federation, name=name, role=role)
    with new_folder(out) as folder:
        keys = PartyKeys.generate(name, role, suite=SUITES[suite])
        request = Request.of(keys, federation=federation, csr_pem=begin_kit(folder, facts, keys))
        put(folder / REQUEST, request.to_text().encode())
    return request


def ask_again(kit: Path) -> Request:
    """A request with the keys that a kit has: for a first certificate, or where the last one has expired.

    Raises:
        KitError: The folder is no party's kit.
    """
    facts = read_facts(kit)
    party_role(facts)
    check_secrets(kit)
    keys = PartyKeys.load(kit / IDENTITY)
    request = Request.of(keys, federation=facts.federation, csr_pem=begin_renewal(kit))
    put(kit / REQUEST, request.to_text().encode())
    return request


def finish(kit: Path, answer: Answer, *, fingerprint: str = "") -> str:
    """Complete a kit with an answer; the federation's fingerprint.

    Guarantee: Where this raises, the kit is as it was. What it pins already is never replaced. Without a fingerprint to
    compare with, everybody who is new to the kit counts as unconfirmed: secure aggregation may refuse them.

    Raises:
        RefusedError: The answer is for another kit, or the federation is not the one of `fingerprint`.
        KitError: The certificate does not fit, or the kit cannot be written.
    """
    facts, pins = read_facts(kit), Pins.from_text(answer.parties)
    if (answer.federation, answer.name) != (facts.federation, facts.name) or pins.federation != facts.federation:
        raise RefusedError(
            f"the answer is for `{answer.name}` of federation `{answer.federation}`",
            hint=f"this is the kit of `{facts.name}` of federation `{facts.federation}`",
        )
    shown = federation_fingerprint(answer.root.encode(), pins)
    if fingerprint and not same_fingerprint(fingerprint, shown):
        raise RefusedError(f"the answer has the fingerprint {shown}", hint="ask for the answer again; do not use this")
    if pins.find(facts.name) != PartyKeys.load(kit / IDENTITY).record:
        raise RefusedError("the answer lists other keys for this party than this kit has", hint=_AGAIN.format(kit))
    known = set(read_pins(kit).records()) if (kit / PARTIES).exists() else set()
    told = [] if fingerprint else [r for r in pins.records() if r not in known and r.name != facts.name]
    root, chain = answer.root.encode(), answer.chain.encode()
    complete_kit(kit, server=answer.server, root=root, chain=chain, pins=pins, unconfirmed=told)
    (kit / REQUEST).unlink(missing_ok=True)
    return shown


def confirm(kit: Path, fingerprint: str) -> str:
    """Take note that a kit's pins are what others have, who read this fingerprint to its administrator.

    Raises:
        RefusedError: The kit's own fingerprint is another: somebody has other records.
        KitError: The kit is incomplete, damaged, or cannot be written.
    """
    shown = federation_fingerprint(read(kit / ROOT), read_pins(kit))
    if not same_fingerprint(fingerprint, shown):
        raise RefusedError(
            f"the kit has the fingerprint {shown}",
            hint="`coterie provision show` lists each party's: find out with the others who differs, and who is right",
        )
    with disk_errors(kit / UNCONFIRMED):
        (kit / UNCONFIRMED).unlink(missing_ok=True)
    return shown


def enrol_with(token: Token, out: Path, *, fingerprint: str = "") -> str:
    """Join over the wire; the federation's fingerprint. A kit that an earlier attempt left is completed.

    Guarantee: Nobody but the holder of the token's root can answer, the coordinator's record must be the one that the
    token names, and nobody is pinned whom it does not name: who joined since it was made is pinned by hand.

    Raises:
        UnreachableError: The coordinator does not answer. The kit stays, to try again.
        RefusedError: The coordinator refuses: the token was used or has expired; or its answer is not sound.
        KitError: There is something else at `out`, or the kit cannot be written.
    """
    if not out.exists():
        begin(out, federation=token.federation, name=token.name, role=token.role, suite=token.suite)
    facts = read_facts(out)
    if (facts.federation, facts.name, facts.role) != (token.federation, token.name, token.role):
        raise KitError(f"{out} is another kit", hint="choose another folder with --out")
    if (out / CHAIN).exists():
        raise KitError(f"{out} has its certificate already", hint="choose another folder with --out")
    chain, parties = _call(token, ask_again(out), out)
    pins = Pins.from_text(parties)
    if pins.coordinator.key_id.hex() != token.coordinator:
        raise RefusedError("the answer names another coordinator than the token", hint="tell whoever made the token")
    known = {token.coordinator, *token.parties}
    trusted = [record for record in pins.records() if record.key_id.hex() in known or record.name == token.name]
    answer = Answer(
        federation=token.federation,
        name=token.name,
        server=token.server,
        chain=chain,
        root=token.root,
        parties=Pins.of(pins.federation, trusted).to_text(),
    )
    return finish(out, answer, fingerprint=fingerprint)


def _call(token: Token, request: Request, out: Path) -> tuple[str, str]:
    """Ask the coordinator, with the token's certificate."""
    from client.connection import CallRefusedError, refusals
    from common.transport import wire_pb2
    from common.transport.channel import PlaneCalls, channel
    from common.transport.wire import Refusal

    tls = Tls(chain=token.chain.encode(), key=token.key.get_secret_value().encode(), root=token.root.encode())
    message = wire_pb2.CertificateRequest(
        csr_pem=request.csr.encode(), record=request.record, signature=bytes.fromhex(request.signature)
    )
    try:
        with refusals(), channel(token.server, tls) as connection:
            answer = PlaneCalls(connection).enrol(message, timeout=_TIMEOUT_SECONDS)
    except CallRefusedError as e:
        if e.refusal in {Refusal.DENIED, Refusal.MALFORMED}:
            raise RefusedError(
                f"the coordinator refuses the token for `{token.name}`: it was used, has expired, or the name is taken",
                hint=f"ask for a new token; or {_AGAIN.format(out)}",
            ) from e
        raise UnreachableError(
            f"the coordinator at {token.server} did not answer ({e.refusal})",
            hint=f"try again with the same command; {out} keeps the keys that were made",
        ) from e
    try:
        return answer.chain_pem.decode("ascii"), answer.parties
    except UnicodeDecodeError as e:
        raise RefusedError("the coordinator's answer is damaged", hint=_AGAIN.format(out)) from e
