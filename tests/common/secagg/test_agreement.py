"""Statements and certificates: how many members make one set of survivors binding, and nothing less does."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import Burning, SecAggError
from common.secagg.agreement import check_burnt, check_statement, check_survivors, checks_needed, make_statement
from common.secagg.messages import Certificate, Statement
from common.secagg.parameters import quorum
from tests.helpers.secagg import names_of, rules, site

NAMES = names_of(6)
RECORDS = {name: site(name).record for name in NAMES}
HEADER, OTHER = b"h" * 32, b"o" * 32
ALL = tuple(range(6))


def signature(rank: int, survivors: tuple[int, ...] = ALL, header: bytes = HEADER) -> bytes:
    return make_statement(header, survivors, site(NAMES[rank])).signature


def check(
    signatures: dict[int, bytes], *, survivors: tuple[int, ...] = ALL, header: bytes = HEADER, least: int = 4
) -> None:
    check_survivors(header, survivors, signatures, least=least, record=lambda rank: RECORDS[NAMES[rank]])


def test_a_quorum_on_the_same_survivors_is_a_certificate() -> None:
    """Four of six, where one may collude."""
    assert quorum(6, 1) == 4
    check({rank: signature(rank) for rank in range(4)})


@pytest.mark.parametrize(
    ("signatures", "reason"),
    [
        ({rank: signature(rank) for rank in range(3)}, "quorum"),
        ({}, "quorum"),
        ({rank: signature(0) for rank in range(4)}, "signature"),
        ({rank: signature(rank) for rank in range(3)} | {3: signature(3, (0, 1, 2, 3, 4))}, "signature"),
        ({rank: signature(rank) for rank in range(3)} | {3: signature(3, header=OTHER)}, "signature"),
        ({rank: signature(rank) for rank in range(3)} | {3: signature(3, ())}, "signature"),
    ],
    ids=["too few", "none", "one signer repeated", "another set", "another header", "burnt"],
)
def test_anything_less_is_none(signatures: dict[int, bytes], reason: str) -> None:
    """Too few, repeated, or on anything else: refused."""
    with pytest.raises(SecAggError) as refused:
        check(signatures)
    assert refused.value.reason == reason


def test_a_large_certificate_with_too_few_good_signatures_is_refused() -> None:
    """Of 200 signatures 100 are good, where 101 are needed: the draw misses that with a chance below 2^-64."""
    survivors = tuple(range(200))
    good = make_statement(HEADER, survivors, site(NAMES[0])).signature
    signatures = {rank: good if rank < 100 else b"bad" for rank in survivors}

    def checked(least: int) -> None:
        check_survivors(HEADER, survivors, signatures, least=least, record=lambda _: RECORDS[NAMES[0]])

    with pytest.raises(SecAggError, match="signature"):
        checked(least=101)


@settings(deadline=None)
@given(st.integers(1, 2000), st.data())
def test_as_many_signatures_are_looked_at_as_the_chance_needs(supplied: int, data: st.DataObject) -> None:
    """With one good signature too few, all drawn ones are good with a chance of at most 2^-64; fewer do not do."""
    least = data.draw(st.integers(1, supplied))
    drawn = checks_needed(supplied, least)

    def chance(count: int) -> Fraction:
        return Fraction(comb(least - 1, count), comb(supplied, count))

    assert 1 <= drawn <= least
    assert chance(drawn) <= Fraction(1, 1 << 64) < chance(drawn - 1)


def test_signers_outside_of_the_survivors_do_not_count() -> None:
    """Who is not in the set cannot vouch for it."""
    survivors = (0, 1, 2, 3)
    with pytest.raises(SecAggError) as refused:
        check({rank: signature(rank, survivors) for rank in (0, 1, 2, 4)}, survivors=survivors)
    assert refused.value.reason == "quorum"


@given(st.integers(1, 2000), st.integers(0, 50))
def test_two_quorums_share_an_honest_member(members: int, colluding: int) -> None:
    """Whatever the numbers: two quorums among so many members overlap in more than the colluders."""
    assert 2 * quorum(members, colluding) - members > colluding
    assert 2 * (quorum(members, colluding) - 1) - members <= colluding  # and no smaller number does


@given(st.integers(1, 300), st.integers(0, 20), st.data())
def test_burnt_excludes_a_survivor_set(members: int, colluding: int, data: st.DataObject) -> None:
    """A quorum of the participants that gave up and one of the group that did not share an honest participant."""
    participants = data.draw(st.integers(1, members))
    given_up, survivors = quorum(participants, colluding), quorum(members, colluding)
    assert given_up + survivors - participants > colluding


def test_a_statement_is_its_signers() -> None:
    """A statement verifies against its signer's pinned record alone, and not when anything of it was changed."""
    said = make_statement(HEADER, (1, 2), site(NAMES[0]))
    check_statement(said, RECORDS[NAMES[0]])
    for wrong, record in [
        (said, RECORDS[NAMES[1]]),
        (replace(said, header=OTHER), RECORDS[NAMES[0]]),
        (replace(said, survivors=(1, 3)), RECORDS[NAMES[0]]),
        (replace(said, survivors=()), RECORDS[NAMES[0]]),
    ]:
        with pytest.raises(SecAggError, match="signature"):
            check_statement(wrong, record)


class TestBurning:
    """Four of six participants give a round up."""

    def burning(self) -> Burning:
        return Burning(HEADER, NAMES, rules=rules(), records=RECORDS)

    def given_up(self, count: int) -> Burning:
        burning = self.burning()
        for name in NAMES[:count]:
            burning.stated(name, make_statement(HEADER, (), site(name)).to_bytes())
        return burning

    def test_a_quorum_burns(self) -> None:
        """The certificate that comes of it verifies."""
        burning = self.given_up(4)
        assert burning.burnt
        certificate = Certificate.from_bytes(burning.certificate())
        check_burnt(certificate, participants=NAMES, colluding=1, peers=RECORDS)

    def test_fewer_do_not(self) -> None:
        """There is no certificate, and what is made of them is refused."""
        burning = self.given_up(3)
        assert not burning.burnt
        with pytest.raises(SecAggError) as refused:
            burning.certificate()
        assert refused.value.reason == "quorum"
        three = Certificate(header=HEADER, signatures=dict.fromkeys(NAMES[:3], b""))
        with pytest.raises(SecAggError, match="too few"):
            check_burnt(three, participants=NAMES, colluding=1, peers=RECORDS)

    def test_nobody_counts_twice(self) -> None:
        """The same statement again changes nothing."""
        burning = self.given_up(3)
        burning.stated(NAMES[0], make_statement(HEADER, (), site(NAMES[0])).to_bytes())
        assert not burning.burnt

    @pytest.mark.parametrize(
        ("name", "said", "reason"),
        [
            ("site-0099", make_statement(HEADER, (), site(NAMES[0])), "participants"),
            (NAMES[0], make_statement(HEADER, ALL, site(NAMES[0])), "statement"),
            (NAMES[0], make_statement(OTHER, (), site(NAMES[0])), "statement"),
            (NAMES[0], make_statement(HEADER, (), site(NAMES[1])), "signature"),
        ],
        ids=["a stranger", "the opposite", "another round", "another's"],
    )
    def test_other_statements_do_not_count(self, name: str, said: Statement, reason: str) -> None:
        """Only a participant's own word on this round does."""
        burning = self.given_up(3)
        with pytest.raises(SecAggError) as refused:
            burning.stated(name, said.to_bytes())
        assert refused.value.reason == reason
        assert not burning.burnt

    @pytest.mark.parametrize(
        "forged",
        [
            bytes(64),
            make_statement(HEADER, ALL, site(NAMES[3])).signature,
            make_statement(OTHER, (), site(NAMES[3])).signature,
        ],
        ids=["no signature", "on survivors", "on another round"],
    )
    def test_one_forged_signature_spoils_a_certificate(self, forged: bytes) -> None:
        """Every signature has to be its signer's own, on this very round, and on giving it up."""
        certificate = Certificate.from_bytes(self.given_up(4).certificate())
        wrong = replace(certificate, signatures=certificate.signatures | {NAMES[3]: forged})
        with pytest.raises(SecAggError, match="signature"):
            check_burnt(wrong, participants=NAMES, colluding=1, peers=RECORDS)

    def test_strangers_in_a_certificate_are_refused(self) -> None:
        """Signatures of those who had no part in the round do not fill a quorum."""
        strangers = {
            f"site-{i:04d}": make_statement(HEADER, (), site(f"site-{i:04d}")).signature for i in range(20, 24)
        }
        with pytest.raises(SecAggError, match="too few"):
            check_burnt(
                Certificate(header=HEADER, signatures=strangers), participants=NAMES, colluding=1, peers=RECORDS
            )
