"""A member during rounds: one mask, one statement, shares for one set; secrets go when they are used up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from common.secagg import Group, Mask, Member, Round, SecAggError
from common.secagg.agreement import make_statement
from common.secagg.keys import KEY_BYTES
from common.secagg.member_state import SHARES_A_ROUND, Step
from common.secagg.messages import (
    Agree,
    Burn,
    Released,
    Statement,
    Train,
    Unmask,
)
from common.secagg.parameters import quorum
from tests.helpers.secagg import CODEC, FIRST, Federation, epoch_of, refusal, rules, site, total, until, vectors_of


@pytest.fixture
def grouped() -> Federation:
    """Six members in two groups of three: a set-up with all five legs."""
    return Federation(6, group_size=3)


@pytest.fixture
def complete() -> Federation:
    """Six members in one group."""
    return Federation(6)


class TestRound:
    """A round, from a request to the released shares."""

    @pytest.fixture
    def group(self, complete: Federation) -> Group:
        return complete.set_up()[0]

    @pytest.fixture
    def opened(self, complete: Federation, group: Group) -> Round:
        return complete.begin(group, base=b"b", size=4)

    @pytest.fixture
    def asked(self, opened: Round) -> Train:
        return Train.from_bytes(opened.requests()[FIRST])

    @pytest.fixture
    def masked(self, complete: Federation, opened: Round) -> Iterator[Round]:
        """Everybody has masked."""
        complete.upload(opened, complete.masks(opened, base=b"b"), vectors_of(complete.names, 4))
        return opened

    @pytest.fixture
    def stated(self, complete: Federation, masked: Round) -> Round:
        """Everybody has stated the survivors."""
        complete.state(masked)
        return masked

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda said: replace(said, index=0), "index"),
            (lambda said: replace(said, index=5), "index"),
            (lambda said: replace(said, participants=(1, 2, 3, 4, 5)), "participants"),
            (lambda said: replace(said, participants=(0, 1, 2)), "participants"),
            (lambda said: replace(said, participants=(0, 1, 2, 3, 4, 5, 6)), "participants"),
            (lambda said: replace(said, epoch=bytes(16)), "epoch"),
        ],
        ids=["index 0", "beyond the epoch", "without me", "too few", "a stranger", "another epoch"],
    )
    def test_requests_that_are_refused(
        self, complete: Federation, asked: Train, change: Callable[[Train], Train], reason: str
    ) -> None:
        """Nothing is written, and the real request is still good."""
        assert refusal(complete, change(asked).to_bytes()) == reason
        member = complete.members[FIRST]
        member.begin(asked.to_bytes(), server_round=complete.server_round, base=b"b", codec=CODEC)

    def test_an_index_serves_once(self, complete: Federation, masked: Round, asked: Train) -> None:
        """Nor does one below it, nor after a restart from an older state: the journal knows."""
        assert refusal(complete, asked.to_bytes()) == "index"
        again = replace(asked, participants=(0, 1, 2, 3, 4))
        assert refusal(complete, again.to_bytes()) == "index"

    def test_an_older_state_masks_no_index_twice(self, complete: Federation, asked: Train) -> None:
        """What the journal has cannot be undone by restoring a state from before."""
        before = complete.members[FIRST].to_bytes()
        complete.members[FIRST].begin(asked.to_bytes(), server_round=1, base=b"b", codec=CODEC)
        complete.members[FIRST] = Member.from_bytes(
            before, signer=site(FIRST), peers=complete.records, rules=complete.rules, journal=complete.journals[FIRST]
        )
        with pytest.raises(SecAggError) as refused:
            complete.members[FIRST].begin(asked.to_bytes(), server_round=1, base=b"another", codec=CODEC)
        assert refused.value.reason == "index"

    def test_an_update_is_masked_once(self, complete: Federation, opened: Round) -> None:
        """The second vector is refused and stays as it was; a vector of the wrong type can be tried again."""
        mask: Mask = complete.masks(opened, base=b"b")[FIRST]
        with pytest.raises(ValueError, match="uint32"):
            mask.apply(np.zeros(4, np.int32))  # type: ignore[arg-type]
        first, second = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
        mask.apply(first)
        with pytest.raises(SecAggError) as refused:
            mask.apply(second)
        assert refused.value.reason == "index"
        assert first.any()
        assert not second.any()

    def test_no_statement_before_the_mask(self, complete: Federation, opened: Round) -> None:
        """A member that has not masked an update says nothing of survivors."""
        complete.masks(opened, base=b"b")
        asked = Agree(epoch=epoch_of(complete).id, index=1, survivors=tuple(range(6)))
        assert refusal(complete, asked.to_bytes()) == "index"

    @pytest.mark.parametrize(
        "survivors", [(1, 2, 3, 4, 5), (0, 1, 2), (0, 1, 2, 3, 4, 5, 6)], ids=["without me", "too few", "strangers"]
    )
    def test_survivors_that_are_refused(self, complete: Federation, masked: Round, survivors: tuple[int, ...]) -> None:
        """A set without this member, with too few or with others."""
        asked = Agree(epoch=epoch_of(complete).id, index=1, survivors=survivors)
        assert refusal(complete, asked.to_bytes()) == "survivors"

    def test_one_statement_ever(self, complete: Federation, masked: Round) -> None:
        """The same again has the same bytes, also after a restart; another set, or burnt, is refused."""
        member, asked = complete.members[FIRST], masked.agree()
        said = member.answer(asked)
        complete.restore(FIRST)
        assert complete.members[FIRST].answer(asked) == said
        other = replace(Agree.from_bytes(asked), survivors=(0, 1, 2, 3, 4))
        assert refusal(complete, other.to_bytes()) == "statement"
        assert refusal(complete, Burn(header=masked.header).to_bytes()) == "statement"

    def test_burnt_is_a_statement_too(self, complete: Federation, masked: Round) -> None:
        """Who gave a round up states no survivors of it."""
        request = masked.burning().request()
        said = complete.members[FIRST].answer(request)
        assert Statement.from_bytes(said).burnt
        assert complete.members[FIRST].answer(request) == said
        assert refusal(complete, masked.agree()) == "statement"
        complete.state(masked, absent=[FIRST])
        assert refusal(complete, masked.unmask()) == "statement"

    def test_no_shares_before_its_own_statement(self, complete: Federation, masked: Round) -> None:
        """A certificate of the others does not make a member release."""
        complete.state(masked, absent=[FIRST])
        assert refusal(complete, masked.unmask()) == "statement"

    def test_shares_only_for_the_set_it_stated(self, complete: Federation, stated: Round) -> None:
        """Another set is refused, even with a quorum's signatures; too few signatures, or wrong ones, too."""
        asked = Unmask.from_bytes(stated.unmask())
        fewer = tuple(range(5))
        forged = {rank: make_statement(stated.header, fewer, site(complete.names[rank])).signature for rank in range(5)}
        assert refusal(complete, replace(asked, survivors=fewer, signatures=forged).to_bytes()) == "statement"
        some = dict(list(asked.signatures.items())[: quorum(6, 1) - 1])
        assert refusal(complete, replace(asked, signatures=some).to_bytes()) == "quorum"
        assert refusal(complete, replace(asked, signatures=some | {5: bytes(64)}).to_bytes()) == "signature"
        assert refusal(complete, replace(asked, index=2).to_bytes()) == "index"

    def test_shares_are_released_again_to_the_same_request(self, complete: Federation, stated: Round) -> None:
        """Byte for byte, also after a restart."""
        request = stated.unmask()
        said = complete.members[FIRST].answer(request)
        complete.restore(FIRST)
        assert complete.members[FIRST].answer(request) == said

    def test_each_neighbour_is_released_in_one_way(self, complete: Federation, opened: Round) -> None:
        """A survivor's share of b, a dropped one's share of kappa; nothing of who did not take part."""
        held = {rank: shares[:SHARES_A_ROUND] for rank, shares in epoch_of(complete).held.items()}
        masks = complete.masks(opened, base=b"b", absent=["site-0005"])
        complete.upload(opened, masks, vectors_of(complete.names, 4))
        complete.state(opened)
        said = Released.from_bytes(complete.members[FIRST].answer(opened.unmask()))
        assert said.shares == {rank: held[rank][:33] for rank in range(1, 5)} | {5: held[5][33:]}

    def test_nothing_is_released_of_who_was_not_asked(self, complete: Federation, group: Group) -> None:
        """A member that is away in a round keeps both of that round's secrets."""
        opened = complete.begin(group, base=b"b", size=4, participants=complete.names[:5])
        complete.upload(opened, complete.masks(opened, base=b"b"), vectors_of(complete.names, 4))
        complete.state(opened)
        assert set(Released.from_bytes(complete.members[FIRST].answer(opened.unmask())).shares) == {1, 2, 3, 4}

    def test_no_round_with_one_that_has_no_keys(self, complete: Federation) -> None:
        """A neighbour that never exchanged keys cannot be a participant: nothing would hide behind its mask."""
        group = complete.set_up(absent={"exchange": ["site-0005"]})[0]
        asked = Train.from_bytes(complete.begin(group, base=b"b", size=4).requests()["site-0004"])
        assert set(epoch_of(complete, "site-0003").pair_keys) == {0, 1, 2, 4, 5}  # it encapsulated a key to it
        with_it = replace(asked, participants=(0, 1, 2, 3, 4, 5)).to_bytes()
        assert 5 not in epoch_of(complete).pair_keys
        assert refusal(complete, with_it) == "participants"

    def test_a_later_round_ends_the_one_before(self, complete: Federation, group: Group, stated: Round) -> None:
        """Its shares are gone, and nobody can ask for them any more."""
        following = complete.begin(group, base=b"c", size=4)
        complete.masks(following, base=b"c")
        assert refusal(complete, stated.unmask()) == "index"


class TestEpochs:
    """Two at a time."""

    def test_an_unfinished_set_up_makes_room(self, complete: Federation) -> None:
        """The epoch in use stays, whatever is set up besides."""
        group = complete.set_up()[0]
        vectors = vectors_of(complete.names, 3)
        complete.round(group, vectors, base=b"1")
        for leg in ("exchange", "deposit", "inbox"):
            until(complete, leg)
        complete.set_up()
        complete.set_up()
        result, names = complete.round(group, vectors, base=b"2")
        assert names == complete.names
        assert (result == total(vectors, names)).all()
        assert len(complete.members[FIRST]._epochs) == 2


class TestErasure:
    """Secrets are not kept beyond their use: the state holds no trace of them."""

    def test_keys_go_when_the_next_ones_are_made(self, complete: Federation) -> None:
        """Private keys and pair secrets are gone after the deposit, the keys of the channels once shares are taken."""
        until(complete, "exchange")
        early = epoch_of(complete)
        secrets = [early.x25519, early.ml_kem, early.nonce]
        setup, request = until(complete, "deposit")
        exchanged = epoch_of(complete)
        assert not exchanged.x25519
        assert not exchanged.nonce
        secrets += [exchanged.ml_kem, *exchanged.secrets.values(), *exchanged.agreed.values()]
        for name, reply in complete.ask(setup.requests()).items():
            setup.receive(name, reply)
        setup.advance()
        channels = list(epoch_of(complete).channels.values())
        assert channels
        complete.ask(setup.requests())
        state = complete.members[FIRST].to_bytes()
        assert all(len(secret) >= 32 and secret not in state for secret in (*secrets, *channels))
        assert request  # it was asked

    def test_a_rounds_secrets_go_with_the_round(self, complete: Federation) -> None:
        """Masks' keys when it begins; shares when a later one does; answers of the set-up with the first."""
        group = complete.set_up()[0]
        epoch = epoch_of(complete)
        keys = [epoch.self_keys[:KEY_BYTES], *(pairs[:KEY_BYTES] for pairs in epoch.pair_keys.values())]
        shares = [held[:SHARES_A_ROUND] for held in epoch.held.values()]
        answers = [answer[32:] for answer in epoch.answers.values() if len(answer) > 100]
        before = complete.members[FIRST].to_bytes()
        assert all(secret in before for secret in (*keys, *shares, *answers))
        opened = complete.begin(group, base=b"1", size=4)
        masks = complete.masks(opened, base=b"1")
        during = complete.members[FIRST].to_bytes()
        assert not any(secret in during for secret in (*keys, *answers))
        assert all(secret in during for secret in shares)
        complete.upload(opened, masks, vectors_of(complete.names, 4))
        assert masks[FIRST]._keys == ()
        group.begin(server_round=2, base=b"2", codec=CODEC, size=4, participants=group.live)  # an index nobody sees
        complete.masks(complete.begin(group, base=b"3", size=4), base=b"3")
        after = complete.members[FIRST].to_bytes()
        assert not any(secret in after for secret in shares)
        assert len(epoch_of(complete).self_keys) == KEY_BYTES
        assert epoch_of(complete).step == Step.USED


class TestRestart:
    """A member's state as bytes."""

    def test_every_member_restarts_after_every_step(self, grouped: Federation) -> None:
        """Sums are as exact as if nothing had happened."""

        def restart(_: object = None) -> None:
            for name in grouped.names:
                grouped.restore(name)

        vectors = vectors_of(grouped.names, 3)
        for group in grouped.set_up(after=restart):
            for base in (b"1", b"2"):
                opened = grouped.begin(group, base=base, size=3)
                grouped.upload(opened, grouped.masks(opened, base=base, absent=()), vectors)
                restart()
                grouped.state(opened)
                restart()
                grouped.release(opened)
                restart()
                assert (opened.result() == total(vectors, group.names)).all()

    def test_a_state_belongs_to_its_rules_and_its_party(self, complete: Federation) -> None:
        """Read under other rules, or by another site, it is refused."""
        data = complete.members[FIRST].to_bytes()
        journal = complete.journals[FIRST]
        for changes, reason in [
            ({"rules": rules(bits=16)}, "rules"),
            ({"signer": site("site-0001")}, "roster"),
        ]:
            settings = {"signer": site(FIRST), "peers": complete.records, "rules": complete.rules, "journal": journal}
            with pytest.raises(SecAggError) as refused:
                Member.from_bytes(data, **(settings | changes))  # type: ignore[arg-type]
            assert refused.value.reason == reason

    def test_secrets_hide(self, complete: Federation) -> None:
        """Neither a member nor a mask prints keys."""
        group = complete.set_up()[0]
        masks = complete.masks(complete.begin(group, base=b"1", size=4), base=b"1")
        epoch = epoch_of(complete)
        for shown in (repr(complete.members[FIRST]), repr(masks[FIRST])):
            for secret in (epoch.self_keys[:8], *(keys[:8] for keys in epoch.pair_keys.values())):
                assert secret.hex() not in shown
                assert repr(secret)[2:-1] not in shown
