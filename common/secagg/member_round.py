"""A member's part in a round: masks for one update, one statement about it, and shares against a certificate."""

from __future__ import annotations

from common.secagg import escrow
from common.secagg.agreement import check_burnt, check_survivors, make_statement
from common.secagg.keys import digest, number, ranks
from common.secagg.mask import Mask
from common.secagg.masks import MaskKey
from common.secagg.member_state import SHARES_A_ROUND, Epoch, Party, Step
from common.secagg.messages import Agree, Burn, Certificate, Released, Statement, Train, Unmask
from common.secagg.parameters import Rules
from common.secagg.parties import Use
from common.secagg.refusal import SecAggError
from common.secagg.shamir import SHARE_BYTES


def header_of(
    group: bytes,
    *,
    rules: Rules,
    server_round: int,
    index: int,
    participants: tuple[int, ...],
    base: bytes,
    codec: bytes,
) -> bytes:
    """The digest that stands for a round: who does not have all of this in common gets noise, not a sum."""
    return digest(
        "header",
        group,
        rules.run_id,
        rules.config_digest,
        number(server_round),
        number(index),
        ranks(participants),
        base,
        codec,
    )


def begin(party: Party, epoch: Epoch, asked: Train, *, server_round: int, base: bytes, codec: bytes) -> Mask:
    """Take part in a round; the journal knows before this returns.

    Raises:
        SecAggError: `epoch`, `index`, `participants`, `base`, `quorum`, `signature`, `roster` or `statement`.
    """
    if epoch.step < Step.READY:
        raise SecAggError("epoch")
    if not max(epoch.index, party.journal.last_index(epoch.id)) < asked.index <= party.rules.epoch_rounds:
        raise SecAggError("index")
    partners = _partners(party, epoch, asked.participants)
    _check_base(party, base, asked.certificates)
    header = header_of(
        epoch.group,
        rules=party.rules,
        server_round=server_round,
        index=asked.index,
        participants=asked.participants,
        base=base,
        codec=codec,
    )
    if party.journal.stated(header) is not None:  # it was given up before it reached this member
        raise SecAggError("statement")
    names = tuple(epoch.names[rank] for rank in asked.participants)
    party.journal.use(Use(header=header, base=base, participants=names, epoch=epoch.id, index=asked.index))
    b, pairs = epoch.start(asked.index)
    epoch.header, epoch.participants = header, asked.participants
    keys = [MaskKey(escrow.self_mask_key(b, header), 1)]
    keys += [MaskKey(escrow.pair_mask_key(pairs[j], header), 1 if epoch.rank < j else -1) for j in partners]

    def done() -> None:
        if epoch.header == header:  # a later round may have begun since
            epoch.masked = 1

    return Mask(header, len(asked.participants), keys, done)


def agree(party: Party, epoch: Epoch, asked: Agree) -> bytes:
    """State who survived; once a round, ever.

    Raises:
        SecAggError: `epoch`, `index`: no update of this member was masked there; `survivors`: they are too few, or not
            all of them took part; `statement`: another one was made.
    """
    _check_current(epoch, asked.index)
    shape = epoch.shape(party.rules)
    survivors = set(asked.survivors)
    if epoch.rank not in survivors or not survivors <= set(epoch.participants) or len(survivors) < shape.fewest:
        raise SecAggError("survivors")
    epoch.check_survivors(asked.survivors, shape)
    return _state(party, epoch.header, asked.survivors)


def burn(party: Party, asked: Burn) -> bytes:
    """State that a round is given up: also one that never reached this member, or of an epoch that it no longer has.

    From then on it does not begin that round. Whoever counts such statements counts those of the participants that
    its own journal has.

    Raises:
        SecAggError: `statement`: this member stated the round's survivors.
    """
    return _state(party, asked.header, ())


def unmask(party: Party, epoch: Epoch, asked: Unmask) -> bytes:
    """Release this member's shares for a round: of each participant one of its two secrets.

    Raises:
        SecAggError: `epoch`, `index`; `statement`: this member did not state these survivors; `quorum`, `signature`:
            too few others did.
    """
    _check_current(epoch, asked.index)
    stated = party.journal.stated(epoch.header)
    if stated is None or Statement.from_bytes(stated).survivors != asked.survivors or not asked.survivors:
        raise SecAggError("statement")
    check_survivors(
        epoch.header,
        asked.survivors,
        asked.signatures,
        least=epoch.shape(party.rules).quorum,
        record=lambda rank: party.peers[epoch.names[rank]],
    )
    survivors, taking_part = set(asked.survivors), set(epoch.participants)
    shares = {}
    for j, held in epoch.held.items():
        if j in taking_part:
            b, kappa = held[:SHARE_BYTES], held[SHARE_BYTES:SHARES_A_ROUND]
            shares[j] = b if j in survivors else kappa
    return Released(header=epoch.header, shares=shares).to_bytes()


def _partners(party: Party, epoch: Epoch, participants: tuple[int, ...]) -> tuple[int, ...]:
    """Neighbours that take part, if this member can join such a round."""
    shape, asked = epoch.shape(party.rules), set(participants)
    if epoch.rank not in asked or not asked <= set(epoch.ring) or len(asked) < shape.fewest:
        raise SecAggError("participants")
    epoch.check_neighbours(participants, shape)
    partners = tuple(j for j in epoch.neighbours if j in asked)
    if not epoch.pair_keys.keys() >= set(partners):  # it never finished its set-up: it cannot take part
        raise SecAggError("participants")
    return partners


def _check_base(party: Party, base: bytes, certificates: tuple[bytes, ...]) -> None:
    """One update of a model, ever; unless all rounds that it was for can never be opened."""
    uses = party.journal.uses(base)
    if not uses:
        return
    burnt = {said.header: said for said in map(Certificate.from_bytes, certificates)}
    for use in uses:
        if use.header not in burnt:
            raise SecAggError("base")
        check_burnt(
            burnt[use.header], participants=use.participants, colluding=party.rules.colluding, peers=party.peers
        )


def _check_current(epoch: Epoch, index: int) -> None:
    """Whether an update was masked in this round, and no later one began."""
    if epoch.step != Step.USED or epoch.index != index or not epoch.masked:
        raise SecAggError("index")


def _state(party: Party, header: bytes, survivors: tuple[int, ...]) -> bytes:
    """The journal's statement if it is this one; else a new one, which the journal has before anybody else."""
    stated = party.journal.stated(header)
    if stated is None:
        stated = make_statement(header, survivors, party.signer).to_bytes()
        party.journal.state(header, stated)
    elif Statement.from_bytes(stated).survivors != survivors:
        raise SecAggError("statement")
    return stated
