"""A coordinator that shows its members different models, participants or rosters: what it gets is noise.

Masks are functions of everything that a round is about, so vectors of different rounds have no mask in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import escrow
from common.secagg.fixed_point import FixedPoint
from common.secagg.messages import Advertise, Exchange, Offers, Statement
from common.secagg.parameters import quorum
from common.secagg.refusal import SecAggError
from tests.helpers.secagg_malice import KINDS, SIZE, Malice, looks_random, refused, shared_ring


def certify(malice: Malice, index: int, survivors: Iterable[int], *, over: int) -> dict[int, str]:
    """Collect statements on a set from whoever makes one, add the colluders', and ask everybody in it to release.

    Args:
        malice: The coordinator.
        index: Of the round.
        survivors: The set.
        over: Whose header the colluders sign.

    Returns:
        Why each honest survivor refuses; empty where it released.
    """
    alive, header = set(survivors), malice.headers[over, index]
    said: dict[int, Statement] = {}
    for rank in sorted(alive - malice.colluders):
        try:
            statement = malice.state(rank, index, alive)
        except SecAggError:
            continue
        if statement.header == header:
            said[rank] = statement
    said |= {rank: malice.forge(rank, header, alive) for rank in malice.colluders & alive}
    return {rank: refused(lambda r=rank: malice.unmask(r, index, alive, said)) for rank in sorted(alive)}


def single_vectors_are_noise(malice: Malice, index: int, ranks: Iterable[int]) -> None:
    """No single honest vector, and no pair of them, comes out of its masks."""
    honest = sorted(set(ranks) - malice.colluders)
    for some in (*combinations(honest, 1), *combinations(honest, 2)):
        assert looks_random(malice.peel(some, index))
    for rank in honest:
        assert None in {malice.secret(kind, rank, index) for kind in KINDS}


class TestModels:
    """Seven members, one colluding, and two models."""

    @pytest.fixture
    def malice(self) -> Malice:
        return Malice(7, colluders=[6]).set_up()

    @pytest.mark.parametrize("odd", [{0}, {0, 1}, {0, 1, 2}])
    def test_another_model_for_some(self, malice: Malice, odd: set[int]) -> None:
        """Whoever got another model is noise in the sum, and by itself; the sum of all is noise."""
        for rank in malice.everybody:
            malice.train(rank, 1, model="theirs" if rank in odd else "ours")
        outcomes = certify(malice, 1, malice.everybody, over=5)
        released = [rank for rank, refusal in outcomes.items() if not refusal]
        assert bool(released) == (len(odd) <= 2)  # five of seven are a quorum
        assert not odd & set(released)
        single_vectors_are_noise(malice, 1, malice.everybody)
        total = malice.peel(range(6), 1)
        assert looks_random(total)
        assert (total == malice.truth(range(6))).sum() < 3  # by chance: below 10^-22

    def test_the_decoder_refuses_such_a_sum(self, malice: Malice) -> None:
        """A sum with one vector of another model lies outside of what honest updates can give."""
        codec = FixedPoint(
            bits=32, dimensions=SIZE, clipping_norm=1.0, most_weight=1, clients=64, metrics=()
        )  # random entries have 120 times the norm that seven can send
        honest = [codec.encode(np.full(SIZE, 0.01), weight=1.0, metrics={}, seed=bytes([rank])) for rank in range(7)]
        assert codec.decode(np.sum(honest, axis=0, dtype=np.uint32), 7).weight == pytest.approx(7)
        for rank in malice.everybody:
            malice.train(rank, 1, model="theirs" if rank == 0 else "ours")
        certify(malice, 1, malice.everybody, over=5)
        noise = malice.peel(range(6), 1)
        total = np.sum(honest, axis=0, dtype=np.uint32)
        total[:SIZE] += noise
        assert refused(lambda: codec.decode(total, 7)) == "range"

    @pytest.mark.parametrize("what", ["server_round", "codec"])
    def test_another_round_or_codec_for_one(self, malice: Malice, what: str) -> None:
        """Rounds and codecs are part of the header as models are."""
        for rank in malice.everybody:
            changed = {"server_round": 9} if what == "server_round" else {"codec": bytes(32)}
            malice.train(rank, 1, **(changed if rank == 0 else {}))
        assert malice.headers[0, 1] != malice.headers[1, 1]
        certify(malice, 1, malice.everybody, over=5)
        single_vectors_are_noise(malice, 1, malice.everybody)


class TestParticipants:
    """The coordinator says who takes part; a quorum counts the whole group all the same."""

    def test_two_halves_with_one_victim_in_common(self) -> None:
        """One half would open the victim's self mask, the other its vault: sets so small are refused."""
        malice = Malice(10).set_up()
        assert malice.shape.quorum == 6
        for rank in (0, 1, 2, 3, 4):
            assert refused(lambda r=rank: malice.train(r, 1, participants=range(5))) == "participants"
        for rank in (5, 6, 7, 8, 9):
            assert not refused(lambda r=rank: malice.train(r, 1, participants=(0, 5, 6, 7, 8, 9)))
        certify(malice, 1, range(5, 10), over=5)
        assert malice.secret(escrow.VAULT, 0, 1) is None

    def test_two_sets_that_overlap_in_the_victim_and_the_colluder(self) -> None:
        """Of two headers at one index at most one is certified, also where colluders sign both."""
        malice = Malice(10, colluders=[5]).set_up()
        first, second = set(range(6)), {0, 5, 6, 7, 8, 9}
        for rank in sorted(first):
            malice.train(rank, 1, participants=first)
        for rank in sorted(second - first):
            malice.train(rank, 1, participants=second)
        one = certify(malice, 1, first, over=0)
        two = certify(malice, 1, second, over=9)
        assert not all(one.values())
        assert all(refusal for rank, refusal in two.items() if rank not in malice.colluders)
        never = [malice.secret(kind, 0, 1) is None for kind in KINDS]
        assert any(never)
        for rank in sorted(first - malice.colluders):
            assert looks_random(malice.peel([rank], 1, participants=first))

    def test_a_victim_alone_under_another_header(self) -> None:
        """Named a survivor of the others' round, its neighbours dropped: one pair's key stays in closed vaults."""
        malice = Malice(10, colluders=[9]).set_up()
        small = set(range(6))
        malice.train(0, 1, participants=small)
        for rank in range(1, 10):
            malice.train(rank, 1)
        alive = {0, 4, 5, 6, 7, 8, 9}  # 1, 2 and 3, with whom the victim shares masks, are said to have dropped
        certify(malice, 1, alive, over=8)
        assert malice.secret(escrow.SELF, 0, 1) is not None
        assert all(malice.pair_key(0, j, 1) is not None for j in (1, 2, 3))
        assert malice.secret(escrow.VAULT, 0, 1) is None
        assert looks_random(malice.peel([0], 1, participants=small))

    @settings(deadline=None, max_examples=20)
    @given(
        asked=st.lists(st.sets(st.integers(0, 7), min_size=5), min_size=2, max_size=2),
        camps=st.lists(st.booleans(), min_size=8, max_size=8),
        dropped=st.sets(st.integers(1, 6), max_size=3),
    )
    def test_whatever_is_shown(self, asked: list[set[int]], camps: list[bool], dropped: set[int]) -> None:
        """Two participant sets, any division of members, any survivors: single vectors stay noise."""
        malice = Malice(8, colluders=[7]).set_up()
        took: dict[int, set[int]] = {}
        for rank in malice.everybody:
            shown = asked[camps[rank]] | {7}
            if rank in shown and not refused(lambda r=rank, s=shown: malice.train(r, 1, participants=s)):
                took[rank] = shown
        for shown in (asked[0] | {7}, asked[1] | {7}):
            first = next((rank for rank, seen in took.items() if seen == shown and rank != 7), None)
            if first is not None:
                certify(malice, 1, shown - dropped, over=first)
        for rank, shown in took.items():
            if rank != 7:
                assert looks_random(malice.peel([rank], 1, participants=shown))
                assert None in {malice.secret(kind, rank, 1) for kind in KINDS}


class TestRingHeaders:
    """A ring, where the quorum alone says nothing of a victim's own neighbours."""

    def test_a_closed_handful_under_another_header(self) -> None:
        """An arc of the ring gets a round of its own and is named alive in the others': its sum stays noise.

        Of the arc's neighbours every other one is kept out of its round, the rest out of the survivors of the others'
        round: as many as each member lets pass. So no neighbour is in both, and all masks of pairs are known or cancel.
        """
        malice = shared_ring()
        index = malice.next_index()
        around, half, least = malice.circle.ring, malice.shape.degree // 2, malice.shape.least_neighbours
        few = 2 * half + 1 - 2 * (2 * half - least)  # the shortest arc that can be cut off so
        arc, left, right = around[half : half + few], around[half - 1 :: -1], around[half + few :]
        outside = {*left[0:half:2], *right[1:half:2]}
        dropped = {*left[1:half:2], *right[0:half:2]}
        for rank in arc:
            malice.train(rank, index, participants=set(malice.everybody) - outside)
        for rank in set(malice.everybody) - set(arc):
            malice.train(rank, index)
        outcomes = certify(malice, index, set(malice.everybody) - dropped, over=around[-1])
        assert [rank for rank, refusal in outcomes.items() if refusal] == sorted(arc)
        for size in (1, 2, few):
            for some in combinations(arc, size):
                assert looks_random(malice.peel(some, index, participants=set(malice.everybody) - outside))


class TestRosters:
    """Two rosters for one epoch: a colluder signed two bundles, and half of the members see the one, half the other."""

    def test_members_that_saw_other_rosters_have_no_key_in_common(self) -> None:
        """Offers are signed for a group: who is offered a key under another roster refuses; no quorum is left."""
        malice = Malice(7, colluders=[6])
        first = tuple(malice.advertise(b"e" * 16))
        asked = Advertise(epoch=malice.epoch, rules=malice.rules.digest).to_bytes()
        second = (*first[:-1], malice.member(malice.names[6]).answer(asked))
        seen = {rank: first if rank % 2 == 0 else second for rank in malice.everybody}
        offers = {}
        for rank, bundles in seen.items():
            said = malice.at(rank).answer(Exchange(epoch=malice.epoch, bundles=bundles, nonces={}).to_bytes())
            offers[rank] = Offers.from_bytes(said)
        assert len({said.group for said in offers.values()}) == 2
        for rank in range(6):
            assert refused(lambda r=rank: malice.deposit_one(r, offers)) == "signature"
            same = {other: said for other, said in offers.items() if seen[other] == seen[rank]}
            refused(lambda r=rank, o=same: malice.deposit_one(r, o))
            for some in combinations(malice.everybody, 5):  # if it can be asked with anybody at all, it is
                if (rank, 1) not in malice.headers:
                    refused(lambda r=rank, s=some: malice.train(r, 1, participants=s))
        began = Counter(malice.headers.values())
        assert max(began.values(), default=0) + len(malice.colluders) < quorum(7, 1)

    def test_one_member_is_asked_with_one_roster(self) -> None:
        """Asked again with another roster, a member refuses; with the same one it sends the same bytes."""
        malice = Malice(7)
        bundles = malice.advertise(b"e" * 16)
        whole = Exchange(epoch=malice.epoch, bundles=tuple(bundles), nonces={}).to_bytes()
        fewer = Exchange(epoch=malice.epoch, bundles=tuple(bundles[:-1]), nonces={}).to_bytes()
        assert malice.at(0).answer(whole) == malice.at(0).answer(whole)
        assert refused(lambda: malice.at(0).answer(fewer)) == "roster"
