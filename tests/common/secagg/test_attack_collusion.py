"""A coordinator and the assumed number of sites put together all they have: it is not enough for anybody's update.

Whatever can be made of shares is compared with the commitment to the secret: nothing is found, or something is.
"""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import escrow
from tests.helpers.secagg_malice import KINDS, Malice, looks_random, refused


@pytest.fixture(scope="module")
def malice() -> Malice:
    """Ten members of whom three collude; they are dealt their shares before any round. Each test takes an index."""
    return Malice(10, colluders=[7, 8, 9], colluding=3, epoch_rounds=8).set_up()


def _train(malice: Malice) -> int:
    index = malice.next_index()
    for rank in malice.everybody:
        malice.train(rank, index)
    return index


class TestBeforeAgreement:
    def test_shares_of_colluders_open_nothing(self, malice: Malice) -> None:
        """Of no honest member any secret, of any round of the epoch."""
        for rank in range(7):
            for index in range(1, 9):
                for kind in KINDS:
                    assert len(malice.pool(kind, rank, index)) >= 3
                    assert malice.secret(kind, rank, index) is None

    def test_masked_vectors_are_noise(self, malice: Malice) -> None:
        """Each, all sums of two and three, and the sum of all honest ones."""
        index = _train(malice)
        for size in (1, 2, 3, 7):
            for some in combinations(range(7), size):
                assert looks_random(malice.peel(some, index))


class TestAfterOpening:
    def test_the_sum_of_the_honest_is_all_there_is(self, malice: Malice) -> None:
        """Colluders take their own vectors out of the sum; any part of what is left is noise."""
        index = _train(malice)
        malice.open_round(index, malice.everybody)
        honest = range(7)
        assert (malice.peel(honest, index) == malice.truth(honest)).all()
        for size in range(1, 7):
            for some in combinations(honest, size):
                assert looks_random(malice.peel(some, index))

    def test_of_each_honest_member_one_secret_is_known(self, malice: Malice) -> None:
        """Of survivors b, of the dropped kappa; never the other one."""
        index = _train(malice)
        alive = set(malice.everybody) - {0, 1}
        malice.open_round(index, alive)
        for rank in range(7):
            known = {kind for kind in KINDS if malice.secret(kind, rank, index) is not None}
            assert known == ({escrow.SELF} if rank in alive else {escrow.VAULT})

    def test_a_dropped_members_vector_that_arrives_late(self, malice: Malice) -> None:
        """All masks that it shares with others are known by then; its own mask is not."""
        index = _train(malice)
        malice.open_round(index, set(malice.everybody) - {0})
        assert all(malice.pair_key(0, j, index) is not None for j in range(1, 10))
        assert looks_random(malice.peel([0], index))
        for j in range(1, 7):
            assert looks_random(malice.peel([0, j], index))
        assert (
            refused(lambda: malice.state(0, index, malice.everybody)) == ""
        )  # it may state: nobody else does any more
        everybody = {rank: malice.forge(rank, malice.headers[0, index], malice.everybody) for rank in (7, 8, 9)}
        outcomes = [refused(lambda r=r: malice.unmask(r, index, malice.everybody, everybody)) for r in range(1, 7)]
        assert set(outcomes) == {"statement"}

    def test_other_rounds_stay_closed(self, malice: Malice) -> None:
        """What is released for one index, the dropped ones' vaults among it, opens nothing of another."""
        index = _train(malice)
        malice.open_round(index, set(malice.everybody) - {0})
        later = _train(malice)
        for rank in range(7):
            assert [kind for kind in KINDS if malice.secret(kind, rank, later) is not None] == []
            assert looks_random(malice.peel([rank], later))
        assert malice.pair_key(0, 1, later) is None


@settings(deadline=None, max_examples=15)
@given(
    dropped=st.sets(st.integers(0, 8), max_size=2),
    colluders=st.sets(st.integers(0, 8), min_size=0, max_size=2),
)
def test_any_two_colluders_and_any_drops(dropped: set[int], colluders: set[int]) -> None:
    """Nine members, two assumed to collude: single updates and pairs of them stay closed, the whole is exact."""
    malice = Malice(9, colluders=colluders, colluding=2, epoch_rounds=1).set_up()
    for rank in malice.everybody:
        malice.train(rank, 1)
    alive = set(malice.everybody) - dropped
    malice.open_round(1, alive)
    honest = sorted(set(malice.everybody) - colluders)
    for some in (*combinations(honest, 1), *combinations(honest, 2)):
        assert looks_random(malice.peel(some, 1))
    whole = sorted(alive - colluders)
    assert (malice.peel(whole, 1) == malice.truth(whole)).all()


def test_shares_fit_their_commitments_once_there_are_enough() -> None:
    """The search for secrets works: with one share more than colluders have, it finds what they could not."""
    malice = Malice(7, colluders=[6], epoch_rounds=1).set_up()
    assert malice.shape.threshold == 3
    for rank in malice.everybody:
        malice.train(rank, 1)
    alive, said = set(malice.everybody), {}
    for rank in alive:
        said[rank] = malice.state(rank, 1, alive)
    malice.unmask(1, 1, alive, said)
    assert malice.secret(escrow.SELF, 0, 1) is None
    malice.unmask(2, 1, alive, said)
    assert malice.secret(escrow.SELF, 0, 1) is not None
