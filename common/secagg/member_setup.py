"""A member's legs of an epoch's set-up. Each answer is made once; all checks come before any change.

New shares or ciphertexts for the same keys would use a key and nonce twice, hence the stored answers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.secagg import escrow
from common.secagg.graph import encapsulates
from common.secagg.keys import KEY_BYTES, label
from common.secagg.member_state import SHARES_A_ROUND, Epoch, Party, Step
from common.secagg.messages import (
    Advertise,
    Bundle,
    Deposit,
    Deposited,
    Exchange,
    Inbox,
    Nonce,
    Offer,
    Offers,
    Ready,
    Reveal,
    offered,
)
from common.secagg.parameters import Shape, needs_beacon
from common.secagg.parties import signed, verify
from common.secagg.refusal import SecAggError
from common.secagg.roster import Roster, beacon_of, circles_of, committed, read_roster
from common.secagg.shamir import split


def advertise(party: Party, request: bytes) -> Epoch:
    """Make the keys of a new epoch; the answer is the epoch's first.

    Raises:
        SecAggError: `rules`: they are not this member's; `epoch`: rounds of it were seen before.
    """
    asked = Advertise.from_bytes(request)
    if asked.rules != party.rules.digest:
        raise SecAggError("rules")
    if party.journal.last_index(asked.epoch):
        raise SecAggError("epoch")
    x25519, ml_kem, nonce = X25519PrivateKey.generate(), MLKEM768PrivateKey.generate(), os.urandom(32)
    bundle = Bundle(
        epoch=asked.epoch,
        name=party.name,
        key_id=party.signer.record.key_id,
        x25519=x25519.public_key().public_bytes_raw(),
        ml_kem=ml_kem.public_key().public_bytes_raw(),
        nonce=committed(asked.epoch, party.name, nonce),
        rules=party.rules.digest,
        signature=b"",
    )
    epoch = Epoch(id=asked.epoch, step=0, x25519=x25519.private_bytes_raw(), ml_kem=ml_kem.private_bytes_raw())
    epoch.nonce = nonce
    epoch.answer(Step.ADVERTISED, request, signed(bundle, "bundle", party.signer).to_bytes())
    return epoch


def reveal(party: Party, epoch: Epoch, request: bytes) -> bytes:
    """Reveal the nonce, once the roster stands.

    Raises:
        SecAggError: The roster is refused; or `beacon`: none is needed, or too many epochs were aborted today.
    """
    if (before := epoch.answered(Step.REVEALED, request)) is not None:
        return before
    asked = Reveal.from_bytes(request)
    roster = _roster(party, epoch, asked.bundles)
    if not needs_beacon(party.rules, len(roster.names)) or party.journal.aborts_today() >= party.most_aborts:
        raise SecAggError("beacon")
    said = signed(Nonce(epoch=epoch.id, roster=roster.digest, nonce=epoch.nonce, signature=b""), "nonce", party.signer)
    epoch.roster = roster.digest
    return epoch.answer(Step.REVEALED, request, said.to_bytes())


def exchange(party: Party, epoch: Epoch, request: bytes) -> bytes:
    """Find one's place in the groups, and encapsulate a key to half of the neighbours.

    Raises:
        SecAggError: The roster or the beacon is refused; `threshold`: the group cannot be safe.
    """
    if (before := epoch.answered(Step.EXCHANGED, request)) is not None:
        return before
    asked = Exchange.from_bytes(request)
    roster = _roster(party, epoch, asked.bundles)
    beacon = _beacon(party, epoch, roster, asked.nonces)
    rank = roster.rank(party.name)
    circle = next(c for c in circles_of(roster, beacon=beacon, rules=party.rules) if rank in c.ring)
    agreed = _agree(epoch, roster, circle.neighbours[rank])
    places = circle.places
    secrets, ciphertexts = {}, {}
    for j in circle.neighbours[rank]:
        if encapsulates(places[rank], places[j], len(places)):
            public = MLKEM768PublicKey.from_public_bytes(roster.bundles[j].ml_kem)
            encapsulated, ciphertexts[j] = public.encapsulate()
            content = hashlib.sha256(ciphertexts[j]).digest()
            names = (roster.names[min(rank, j)], roster.names[max(rank, j)])  # ranks follow names
            secrets[j] = escrow.pair_secret(
                agreed.pop(j), encapsulated, group=circle.digest, names=names, offer=content
            )
    digests = {j: hashlib.sha256(ciphertext).digest() for j, ciphertext in ciphertexts.items()}
    signature = party.signer.sign(label("offers"), offered(circle.digest, party.name, digests))
    offers = Offers(epoch=epoch.id, group=circle.digest, ciphertexts=ciphertexts, signature=signature)
    reply = offers.to_bytes()
    epoch.roster, epoch.names, epoch.group, epoch.ring = roster.digest, roster.names, circle.digest, circle.ring
    epoch.rank, epoch.neighbours = rank, circle.neighbours[rank]
    epoch.secrets, epoch.agreed = secrets, agreed
    epoch.x25519 = epoch.nonce = b""
    return epoch.answer(Step.EXCHANGED, request, reply)


def deposit(party: Party, epoch: Epoch, request: bytes) -> bytes:
    """Make all secrets of the epoch's rounds, and give them into the custody of the neighbours.

    Raises:
        SecAggError: `signature`, `roster`: an offer is not one; `threshold`: too few pairs have a key.
    """
    if (before := epoch.answered(Step.DEPOSITED, request)) is not None:
        return before
    if epoch.step != Step.EXCHANGED:
        raise SecAggError("epoch")
    asked = Deposit.from_bytes(request)
    secrets = epoch.secrets | _decapsulate(party, epoch, asked.offers)
    shape, rounds = epoch.shape(party.rules), party.rules.epoch_rounds
    pairs = tuple(sorted(secrets))
    if len(pairs) < max(shape.threshold, shape.least_neighbours, shape.fewest - 1 if shape.complete else 0):
        raise SecAggError("threshold")
    keys = {j: escrow.round_keys(secrets[j], rounds) for j in pairs}
    escrowed = [os.urandom(KEY_BYTES) for _ in range(2 * rounds)]  # b_1, kappa_1, b_2, ...
    deposited = _deposited(epoch, shape, secrets=secrets, keys=keys, escrowed=escrowed, names=epoch.names)
    reply = signed(deposited, "deposited", party.signer).to_bytes()
    epoch.pair_keys, epoch.self_keys = keys, b"".join(escrowed[::2])
    epoch.channels = {j: escrow.channel_key(secrets[j], sender=epoch.names[j], receiver=party.name) for j in pairs}
    epoch.ml_kem, epoch.secrets, epoch.agreed = b"", {}, {}
    return epoch.answer(Step.DEPOSITED, request, reply)


def receive(party: Party, epoch: Epoch, request: bytes) -> bytes:
    """Take the neighbours' shares into custody.

    What does not open is as if it had not come: then this member holds no share of that neighbour's secrets.

    Raises:
        SecAggError: `roster`: shares of others than neighbours.
    """
    if (before := epoch.answered(Step.READY, request)) is not None:
        return before
    if epoch.step != Step.DEPOSITED:
        raise SecAggError("epoch")
    asked = Inbox.from_bytes(request)
    if not asked.shares.keys() <= epoch.channels.keys():
        raise SecAggError("roster")
    size, held = SHARES_A_ROUND * party.rules.epoch_rounds, {}
    for j, sealed in asked.shares.items():
        shares = escrow.open_shares(epoch.channels[j], sealed, group=epoch.group, sender=j, receiver=epoch.rank)
        if shares is not None and len(shares) == size:
            held[j] = shares
    epoch.held, epoch.channels = held, {}
    return epoch.answer(Step.READY, request, Ready(epoch=epoch.id).to_bytes())


def _roster(party: Party, epoch: Epoch, bundles: tuple[bytes, ...]) -> Roster:
    """The roster, if it holds this member's own bundle as it was sent."""
    roster = read_roster(bundles, epoch=epoch.id, rules=party.rules, records=party.peers, known=epoch.roster)
    if bundles[roster.rank(party.name)] != epoch.answers[Step.ADVERTISED][32:]:
        raise SecAggError("roster")
    return roster


def _beacon(party: Party, epoch: Epoch, roster: Roster, nonces: Mapping[int, bytes]) -> bytes:
    """The beacon for the roster that this member revealed its nonce for; empty where none is needed."""
    if not needs_beacon(party.rules, len(roster.names)):
        if nonces or epoch.step != Step.ADVERTISED:
            raise SecAggError("beacon")
        return b""
    if epoch.step != Step.REVEALED:
        raise SecAggError("beacon")
    if roster.digest != epoch.roster:
        raise SecAggError("roster")
    return beacon_of(nonces, roster=roster, records=party.peers)


def _agree(epoch: Epoch, roster: Roster, neighbours: tuple[int, ...]) -> dict[int, bytes]:
    """X25519 secrets with all neighbours."""
    private = X25519PrivateKey.from_private_bytes(epoch.x25519)
    try:
        return {j: private.exchange(X25519PublicKey.from_public_bytes(roster.bundles[j].x25519)) for j in neighbours}
    except ValueError as e:  # a key that agrees on nothing: the coordinator should not have let it in
        raise SecAggError("roster") from e


def _decapsulate(party: Party, epoch: Epoch, offers: Mapping[int, bytes]) -> dict[int, bytes]:
    """Secrets with those that encapsulated to this member; who vanished before is not among them."""
    private = MLKEM768PrivateKey.from_seed_bytes(epoch.ml_kem)
    secrets = {}
    for j, raw in offers.items():
        if j not in epoch.agreed:
            raise SecAggError("roster")
        offer, name = Offer.from_bytes(raw), epoch.names[j]
        content = hashlib.sha256(offer.ciphertext).digest()
        if offer.digests.get(epoch.rank) != content:
            raise SecAggError("signature")
        verify(party.peers[name], "offers", offered(epoch.group, name, offer.digests), offer.signature)
        names = (min(name, party.name), max(name, party.name))
        secrets[j] = escrow.pair_secret(
            epoch.agreed[j], private.decapsulate(offer.ciphertext), group=epoch.group, names=names, offer=content
        )
    return secrets


def _deposited(
    epoch: Epoch,
    shape: Shape,
    *,
    secrets: Mapping[int, bytes],
    keys: Mapping[int, bytes],
    escrowed: list[bytes],
    names: tuple[str, ...],
) -> Deposited:
    """Vaults, commitments and shares, not yet signed. A neighbour without a pair key gets no share."""
    group, rank = epoch.group, epoch.rank
    vaults = tuple(
        escrow.seal_vault(
            kappa, [keys[j][KEY_BYTES * at : KEY_BYTES * (at + 1)] for j in keys], group=group, rank=rank, index=at + 1
        )
        for at, kappa in enumerate(escrowed[1::2])
    )
    commitments = tuple(
        escrow.commitment(group, rank, at // 2 + 1, (escrow.SELF, escrow.VAULT)[at % 2], secret)
        for at, secret in enumerate(escrowed)
    )
    parts = split(escrowed, threshold=shape.threshold, holders=len(epoch.neighbours))
    sealed = {}
    for j, shares in zip(epoch.neighbours, parts, strict=True):
        if j in secrets:
            key = escrow.channel_key(secrets[j], sender=names[rank], receiver=names[j])
            sealed[j] = escrow.seal_shares(key, shares, group=group, sender=rank, receiver=j)
    return Deposited(epoch=epoch.id, group=group, vaults=vaults, commitments=commitments, shares=sealed, signature=b"")
