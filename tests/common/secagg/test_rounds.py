"""Rounds end in the exact sum over the survivors, or in a refusal; whoever vanishes costs only itself."""

from __future__ import annotations

import os
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import Group, Round, SecAggError
from common.secagg.agreement import make_statement
from common.secagg.messages import Released
from common.secagg.packing import pack
from common.secagg.parameters import shape_of
from common.secagg.recovery import Recovery
from common.secagg.refusal import Reason
from common.secagg.shamir import split
from tests.helpers.secagg import Federation, Words, refusal, site, total, vectors_of

SETUP = ("advertise", "exchange", "deposit", "inbox")
STEPS = (*SETUP, "train", "mask", "agree", "unmask", "never")
"""When a member vanishes: at a leg of the set-up, before or after its training began, or later."""


def opens(leaving: dict[str, str], *, colluding: int) -> bool:
    """Whether a round can be opened, counted from the rules alone."""
    place = {name: STEPS.index(step) for name, step in leaving.items()}

    def there(step: str) -> set[str]:
        return {name for name, at in place.items() if at > STEPS.index(step)}

    members = len(there("advertise"))
    try:
        shape = shape_of(members, rules=Federation(0, colluding=colluding).rules)
    except SecAggError:
        return False
    survivors, signers, holders = there("mask"), there("agree"), there("unmask")
    if min(len(there("inbox")), len(survivors)) < shape.fewest or len(signers) < shape.quorum:
        return False
    needed = there("inbox")
    return all(len(holders - {name}) >= shape.threshold for name in needed)


def play(federation: Federation, leaving: dict[str, str], vectors: dict[str, Words]) -> tuple[Words, set[str]]:
    """A set-up and a round in which members vanish for good."""

    def gone(step: str) -> list[str]:
        return [name for name, at in leaving.items() if STEPS.index(at) <= STEPS.index(step)]

    groups = federation.set_up(absent={leg: gone(leg) for leg in SETUP})
    if not groups:
        raise SecAggError("participants")
    opened = federation.begin(groups[0], base=b"base", size=8)
    masks = federation.masks(opened, base=b"base", absent=gone("train"))
    federation.upload(opened, {name: mask for name, mask in masks.items() if name not in gone("mask")}, vectors)
    federation.state(opened, absent=gone("agree"))
    federation.release(opened, absent=gone("unmask"))
    return opened.result(), set(opened.survivors)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from((*STEPS, *("never",) * 12)), min_size=3, max_size=9), st.integers(0, 2))
def test_any_pattern_of_dropouts(steps: list[str], colluding: int) -> None:
    """The sum is exact if the rules' counts are met at every leg, and refused otherwise."""
    federation = Federation(len(steps), colluding=colluding)
    leaving = dict(zip(federation.names, steps, strict=True))
    vectors = vectors_of(federation.names, 8)
    if opens(leaving, colluding=colluding):
        result, survivors = play(federation, leaving, vectors)
        assert survivors == {name for name, at in leaving.items() if STEPS.index(at) > STEPS.index("mask")}
        assert (result == total(vectors, survivors)).all()
    else:
        with pytest.raises(SecAggError):
            play(federation, leaving, vectors)


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
def test_every_ring(bits: int) -> None:
    """Sums wrap at the run's own ring."""
    federation = Federation(5, bits=bits)
    vectors = vectors_of(federation.names, 101, bits=bits)
    result, names = federation.round(federation.set_up()[0], vectors, base=b"b", absent={"train": federation.names[:1]})
    assert names == federation.names[1:]
    assert (result == total(vectors, names, bits=bits)).all()


def test_rounds_of_an_epoch_and_the_next() -> None:
    """Members leave for a round or for good; who was away in one epoch is in the next."""
    federation = Federation(9)
    vectors = vectors_of(federation.names, 5)
    group = federation.set_up(absent={"deposit": federation.names[8:]})[0]
    assert group.names == federation.names[:8]
    for number, away in enumerate(([], [0], [0, 1], [2])):
        result, names = federation.round(
            group, vectors, base=bytes([number]), absent={"train": [federation.names[i] for i in away]}
        )
        assert len(names) == 8 - len(away)
        assert (result == total(vectors, names)).all()
    assert group.rounds_left == 0
    with pytest.raises(SecAggError) as refused:
        federation.begin(group, base=b"5", size=5)
    assert refused.value.reason == "index"
    result, names = federation.round(federation.set_up()[0], vectors, base=b"next")
    assert names == federation.names
    assert (result == total(vectors, names)).all()


def test_the_next_epoch_is_set_up_during_the_last_one() -> None:
    """A member holds the current epoch and the next, and goes over when the next one's first round begins."""
    federation = Federation(4, epoch_rounds=3)
    vectors = vectors_of(federation.names, 5)
    current = federation.set_up()[0]
    assert (federation.round(current, vectors, base=b"1")[0] == total(vectors, federation.names)).all()
    following = federation.set_up()[0]
    assert (federation.round(current, vectors, base=b"2")[0] == total(vectors, federation.names)).all()
    assert (federation.round(following, vectors, base=b"3")[0] == total(vectors, federation.names)).all()
    late = federation.begin(current, base=b"4", size=5)
    assert {refusal(federation, late.requests()[name], name=name) for name in federation.names} == {"epoch"}


def test_every_group_has_its_own_round() -> None:
    """Groups of at least four among nine, two of four and five; each has its own sum."""
    federation = Federation(9, group_size=4)
    groups = federation.set_up()
    assert sorted(len(group.names) for group in groups) == [4, 5]
    assert {name for group in groups for name in group.names} == set(federation.names)
    vectors = vectors_of(federation.names, 6)
    federation.server_round = 1
    for group in groups:
        result, names = federation.round(group, vectors, base=b"one", absent={"train": group.names[:1]})
        assert names == group.names[1:]
        assert (result == total(vectors, names)).all()


class TestBurning:
    """A round that is given up, and its model."""

    def test_the_model_is_trained_on_again_once_burnt(self) -> None:
        """Without a certificate everybody refuses the model; with it the next index works."""
        federation = Federation(5)
        group, vectors = federation.set_up()[0], vectors_of(federation.names, 6)
        first = federation.begin(group, base=b"same", size=6)
        federation.upload(first, federation.masks(first, base=b"same", absent=federation.names[:3]), vectors)
        with pytest.raises(SecAggError) as refused:
            first.agree()
        assert refused.value.reason == "survivors"
        again = federation.begin(group, base=b"same", size=6)
        assert set(federation.masks(again, base=b"same")) == set(federation.names[:3])  # they never began the first
        both = [federation.burn(first), federation.burn(again)]
        result, names = federation.round(group, vectors, base=b"same", burnt=both)
        assert names == federation.names
        assert (result == total(vectors, names)).all()

    def test_one_certificate_of_two_is_not_enough(self) -> None:
        """Every round that used the model has to be given up."""
        federation = Federation(4)
        group = federation.set_up()[0]
        first = federation.begin(group, base=b"same", size=6)
        assert len(federation.masks(first, base=b"same")) == 4
        one = federation.burn(first)
        second = federation.begin(group, base=b"same", size=6, burnt=[one])
        assert len(federation.masks(second, base=b"same")) == 4
        third = federation.begin(group, base=b"same", size=6, burnt=[one])
        assert not federation.masks(third, base=b"same")

    def test_a_certificate_outlives_epochs_and_processes(self) -> None:
        """Members that restarted say it from their journal, and believe it of a round of another epoch."""
        federation = Federation(4)
        group, vectors = federation.set_up()[0], vectors_of(federation.names, 6)
        first = federation.begin(group, base=b"same", size=6)
        federation.masks(first, base=b"same")
        federation.members = {name: federation.member(name) for name in federation.names}
        certificate = federation.burn(first)
        result, names = federation.round(federation.set_up()[0], vectors, base=b"same", burnt=[certificate])
        assert names == federation.names
        assert (result == total(vectors, names)).all()

    def test_an_opened_round_cannot_be_burnt(self) -> None:
        """Who stated survivors never states the opposite, and the model stays used."""
        federation = Federation(4)
        group, vectors = federation.set_up()[0], vectors_of(federation.names, 6)
        opened = federation.begin(group, base=b"same", size=6)
        federation.upload(opened, federation.masks(opened, base=b"same"), vectors)
        federation.state(opened)
        with pytest.raises(SecAggError) as refused:
            federation.burn(opened)
        assert refused.value.reason == "quorum"

    def test_a_burnt_round_is_not_begun_afterwards(self) -> None:
        """A member that gave a round up before its request came refuses the request."""
        federation = Federation(4)
        late = federation.begin(federation.set_up()[0], base=b"same", size=6)
        federation.burn(late)
        assert not federation.masks(late, base=b"same")


class TestCoordinator:
    """What the coordinator takes, from whom, and when."""

    @pytest.fixture
    def federation(self) -> Federation:
        return Federation(6)

    @pytest.fixture
    def group(self, federation: Federation) -> Group:
        return federation.set_up()[0]

    def opened(self, federation: Federation, group: Group, *, absent: int = 0) -> tuple[Round, dict[str, Words]]:
        vectors = vectors_of(federation.names, 6)
        opened = federation.begin(group, base=b"b", size=6)
        federation.upload(opened, federation.masks(opened, base=b"b", absent=federation.names[:absent]), vectors)
        return opened, vectors

    def test_a_vector_counts_once_and_in_time(self, federation: Federation, group: Group) -> None:
        """Twice, uninvited, malformed or late: refused, and the sum is as before."""
        opened, vectors = self.opened(federation, group, absent=1)
        for name, data in [
            (federation.names[1], pack(vectors[federation.names[1]], 32)),
            ("site-0099", pack(vectors[federation.names[1]], 32)),
            (federation.names[0], np.zeros(23, np.uint8)),
        ]:
            with pytest.raises(SecAggError):
                opened.add(name, data)
        federation.state(opened)
        with pytest.raises(SecAggError) as refused:
            opened.add(federation.names[0], pack(vectors[federation.names[0]], 32))
        assert refused.value.reason == "survivors"
        federation.release(opened)
        assert (opened.result() == total(vectors, federation.names[1:])).all()

    def test_nothing_is_asked_before_its_time(self, federation: Federation, group: Group) -> None:
        """No shares without a quorum, no sum without shares."""
        opened, vectors = self.opened(federation, group)
        federation.state(opened, absent=federation.names[:3])
        assert not opened.agreed
        with pytest.raises(SecAggError, match="too few members signed"):
            opened.unmask()
        assert not opened.ready
        with pytest.raises(SecAggError, match="shares are missing"):
            opened.result()
        federation.state(opened)
        federation.release(opened, absent=federation.names[2:])
        with pytest.raises(SecAggError, match="shares are missing"):
            opened.result()
        federation.release(opened)
        assert (opened.result() == total(vectors, federation.names)).all()
        assert opened.result() is opened.result()

    def test_wrong_shares_show_and_are_left_out(self, federation: Federation, group: Group) -> None:
        """Commitments tell which shares are wrong; enough right ones still open the sum."""
        opened, vectors = self.opened(federation, group, absent=1)
        federation.state(opened)
        for place, (name, reply) in enumerate(federation.ask(dict.fromkeys(opened.signers, opened.unmask())).items()):
            said = Released.from_bytes(reply)
            if place in {0, 2}:
                wrong = {rank: bytes([0, share[1] ^ 1]) + share[2:] for rank, share in said.shares.items()}
                opened.shares(name, Released(header=said.header, shares=wrong).to_bytes())
            else:
                opened.shares(name, reply)
        assert (opened.result() == total(vectors, federation.names[1:])).all()

    def test_too_many_wrong_shares_end_the_round(self, federation: Federation, group: Group) -> None:
        """No sum rather than a wrong one."""
        opened, _ = self.opened(federation, group)
        federation.state(opened)
        for name, reply in federation.ask(dict.fromkeys(opened.signers, opened.unmask())).items():
            shares = {rank: bytes(33) for rank in Released.from_bytes(reply).shares}
            opened.shares(name, Released(header=opened.header, shares=shares).to_bytes())
        assert opened.ready
        with pytest.raises(SecAggError) as refused:
            opened.result()
        assert refused.value.reason == "shares"

    def test_shares_of_another_round_are_refused(self, federation: Federation, group: Group) -> None:
        """A reply names its round."""
        opened, _ = self.opened(federation, group)
        federation.state(opened)
        with pytest.raises(SecAggError) as refused:
            opened.shares(federation.names[0], Released(header=bytes(32), shares={}).to_bytes())
        assert refused.value.reason == "shares"

    def test_only_live_members_are_asked(self, federation: Federation, group: Group) -> None:
        """Who lost its state is left out, as long as enough are live."""
        group.live -= {federation.names[0]}
        with pytest.raises(SecAggError) as refused:
            federation.begin(group, base=b"b", size=6, participants=federation.names)
        assert refused.value.reason == "participants"
        assert group.rounds_left == 4
        group.live = set(federation.names[:3])
        with pytest.raises(SecAggError):
            federation.begin(group, base=b"b", size=6)

    def test_statements_on_anything_else_do_not_count(self, federation: Federation, group: Group) -> None:
        """A survivor's word on another round, or another's word, is refused."""
        opened, _ = self.opened(federation, group)
        replies = federation.ask(dict.fromkeys(opened.survivors, opened.agree()))
        one, two = federation.names[:2]
        with pytest.raises(SecAggError, match="signature"):
            opened.stated(one, replies[two])
        for header, survivors in ((opened.header, (0, 1, 2, 3)), (opened.header, ()), (bytes(32), tuple(range(6)))):
            with pytest.raises(SecAggError) as refused:
                opened.stated(one, make_statement(header, survivors, site(one)).to_bytes())
            assert refused.value.reason == "statement"
        assert not opened.signers


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 8), st.data())
def test_wrong_holders_are_found(threshold: int, spare: int, data: st.DataObject) -> None:
    """With few wrong shares the secret comes out, and only those who sent them are suspected."""
    holders = threshold + spare
    secrets = [bytes([i]) * 32 for i in range(3)]
    parts = dict(enumerate(split(secrets, threshold=threshold, holders=holders)))
    wrong = data.draw(st.sets(st.integers(0, holders - 1), max_size=2))
    recovery = Recovery(threshold)
    places = {holder: holder + 1 for holder in parts}
    for at, secret in enumerate(secrets):
        shares = {holder: part[33 * at : 33 * at + 33] for holder, part in parts.items()}
        shares |= {holder: b"\0" + os.urandom(32) for holder in wrong}
        assert recovery.secret(shares, places=places, fits=secret.__eq__) == secret
    assert recovery.suspects <= wrong


def test_every_reason_has_a_sentence() -> None:
    """An error says what to do; its reason is what programs look at."""
    for reason in get_args(Reason):
        error = SecAggError(reason)
        assert error.hint
        assert error.reason == reason
