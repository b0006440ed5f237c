"""What members sign about a round, and how many of them make it binding.

Why one binding survivor set is enough. A holder gives away shares of a round's secrets only against a certificate: a
quorum, more than (n + c) / 2 of the n members of its group, that signed the same statement (header, survivors). Two
quorums share more than c members, so at least one honest one. An honest member masks once under an index, so under one
header, and states one thing about it, ever. So under an index of an epoch at most one (header, survivors) ever gets a
certificate, whatever different rosters, participants or models the coordinator showed: n counts the whole group, not
the participants, because those are the coordinator's to choose. All honest holders that release anything for this index
release for this one set: of a survivor, shares of b; of a dropped one, shares of kappa; never both. The other kind is
held by at most c colluding holders, fewer than the threshold t >= c + 1, and tells nothing.

Burnt rounds. More than (m + c) / 2 of the m participants that state "burnt" share an honest one with every quorum on a
survivor set of that header (whose signers are participants, and more than (n + c) / 2 >= (m + c) / 2 of them): no such
quorum can exist, nor ever will.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from functools import lru_cache
from secrets import SystemRandom

from common.secagg.messages import Certificate, Statement
from common.secagg.parameters import quorum
from common.secagg.parties import Record, Signer, signed, verify
from common.secagg.refusal import SecAggError

_WHAT = "statement"
_SECURITY_BITS = 64


def make_statement(header: bytes, survivors: tuple[int, ...], signer: Signer) -> Statement:
    """Sign a statement; without survivors it says that the round is burnt."""
    return signed(Statement(header=header, survivors=survivors, signature=b""), _WHAT, signer)


def check_statement(statement: Statement, record: Record) -> None:
    """Check who made a statement.

    Raises:
        SecAggError: `signature`.
    """
    verify(record, _WHAT, statement.body(), statement.signature)


def check_survivors(
    header: bytes,
    survivors: tuple[int, ...],
    signatures: Mapping[int, bytes],
    *,
    least: int,
    record: Callable[[int], Record],
) -> None:
    """Check a certificate: enough survivors signed that they are the survivors.

    Args:
        header: The round's digest.
        survivors: Their ranks.
        signatures: By rank.
        least: `quorum` of the group.
        record: The pinned record of a rank.

    Guarantee:
        With fewer than `least` good signatures it is refused, but for a chance of 2^-64 over the ranks drawn here.

    Raises:
        SecAggError: `quorum`: too few, or not by survivors; `signature`: one that was looked at does not verify.
    """
    if len(signatures) < least or not signatures.keys() <= set(survivors):
        raise SecAggError("quorum")
    body = Statement(header=header, survivors=survivors, signature=b"").body()
    for rank in SystemRandom().sample(sorted(signatures), checks_needed(len(signatures), least)):
        verify(record(rank), _WHAT, body, signatures[rank])


@lru_cache(maxsize=256)
def checks_needed(supplied: int, least: int) -> int:
    """How many of the supplied signatures to verify, drawn at random.

    If fewer than `least` are good, all drawn ones are with a chance of at most 2^-64; where `least` are drawn, never.

    Each of a thousand members verifies 71 of 950, not 526: those were most of what a round cost it.
    """
    good, drawn, chance = least - 1, 0, Fraction(1)
    while chance * (1 << _SECURITY_BITS) > 1:
        chance *= Fraction(good - drawn, supplied - drawn)
        drawn += 1
    return drawn


def check_burnt(
    certificate: Certificate, *, participants: Collection[str], colluding: int, peers: Mapping[str, Record]
) -> None:
    """Check that a round can never be opened.

    Args:
        certificate: Of that round.
        participants: Who was asked in it, as the reader's own journal says.
        colluding: How many members may collude.
        peers: The pinned records.

    Raises:
        SecAggError: `quorum`: too few signed, or not participants; `signature`: one does not verify.
    """
    signers = certificate.signatures.keys()
    if len(signers) < quorum(len(participants), colluding) or not signers <= set(participants):
        raise SecAggError("quorum")
    body = Statement(header=certificate.header, survivors=(), signature=b"").body()
    for name, signature in certificate.signatures.items():
        if name not in peers:
            raise SecAggError("roster")
        verify(peers[name], _WHAT, body, signature)
