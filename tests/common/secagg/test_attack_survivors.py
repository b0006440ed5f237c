"""A coordinator that shows its members different survivors: none of it opens anything but one sum of enough members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import escrow
from common.secagg.messages import Agree, Statement, Unmask
from common.secagg.refusal import SecAggError
from tests.helpers.secagg_malice import KINDS, Malice, looks_random, refused, shared_ring
from tests.helpers.secagg_views import complete, ring, views_against

Views = Mapping[int, frozenset[int]]


def show(malice: Malice, index: int, views: Views) -> dict[int, str]:
    """Ask each honest member to state the survivors it is shown, then to release shares; why each release is refused.

    Colluders sign every set that anybody is shown. A refused statement does not keep the coordinator from asking on.
    """
    said: dict[int, Statement] = {}
    for rank, view in views.items():
        try:
            said[rank] = malice.state(rank, index, view)
        except SecAggError:
            continue
    header = malice.headers[next(iter(views)), index]
    outcomes = {}
    for rank, view in views.items():
        equal = {other: one for other, one in said.items() if one.survivors == tuple(sorted(view))}
        forged = {other: malice.forge(other, header, view) for other in malice.colluders & view}
        outcomes[rank] = refused(lambda r=rank, v=view, c={**equal, **forged}: malice.unmask(r, index, v, c))
    return outcomes


def nothing_is_known(malice: Malice, index: int, victims: Iterable[int]) -> None:
    """No secret of an honest victim can be found, and its vector stays noise."""
    for victim in victims:
        assert [kind for kind in KINDS if malice.secret(kind, victim, index) is not None] == []
        assert looks_random(malice.peel([victim], index))


def never_both(malice: Malice, index: int, members: Iterable[int]) -> None:
    """Of no honest member both secrets are known."""
    for rank in set(members) - malice.colluders:
        assert None in {malice.secret(kind, rank, index) for kind in KINDS}


CASES: Mapping[str, Callable[[], tuple[Malice, int]]] = {
    "complete graph, 6 of 20 collude": lambda: (Malice(20, colluders=range(14, 20), colluding=6).set_up(), 2),
    "regular graph, nobody colludes": lambda: (shared_ring(), 1),
    "regular graph, 5 % collude": lambda: (Malice(140, colluders=range(7, 140, 20), colluding=7).set_up(), 3),
}
"""The transcripts that lay updates bare in two trips (`test_what_the_old_way_lost.py`), and how many victims."""


@pytest.mark.parametrize("case", CASES)
def test_every_holder_sees_other_survivors(case: str) -> None:
    """The sets are those that open the victims' vectors in two trips; here shares come for one of them at most."""
    malice, count = CASES[case]()
    index = malice.next_index()
    for rank in malice.everybody:
        malice.train(rank, index)
    size, shape, around = len(malice.names), malice.shape, malice.circle.ring
    graph = complete(size) if shape.complete else ring(size, shape.degree)
    colluders = frozenset(place for place, rank in enumerate(around) if rank in malice.colluders)
    victims = sorted(set(graph) - colluders)[:count]
    threshold = (shape.degree + (len(colluders) if shape.complete else 0)) // 2 + 1
    views = views_against(victims, graph=graph, threshold=threshold, colluders=colluders)
    shown = {around[holder]: frozenset(around[place] for place in view) for holder, view in views.items()}
    outcomes = show(malice, index, shown)
    assert len({shown[rank] for rank, refusal in outcomes.items() if not refusal}) <= 1
    assert set(outcomes.values()) <= {"quorum", "statement", ""}
    bare = [around[place] for place in victims]
    never_both(malice, index, bare)
    for some in (*([victim] for victim in bare), bare):
        assert looks_random(malice.peel(some, index))


def test_three_members_of_whom_one_colludes() -> None:
    """A member holds no share of its own secrets: with n = 3 the one colluder has a single share of each."""
    malice = Malice(3, colluders=[2]).set_up()
    for rank in malice.everybody:
        malice.train(rank, 1)
    nothing_is_known(malice, 1, [0, 1])
    for rank in (0, 1):  # each is told that the other dropped, the colluder that nobody did
        assert refused(lambda r=rank: malice.state(r, 1, {r, 2})) == "survivors"
    malice.open_round(1, malice.everybody)
    never_both(malice, 1, malice.everybody)
    assert looks_random(malice.peel([0], 1))
    assert (malice.peel([0, 1], 1) == malice.truth([0, 1])).all()


class TestOneSet:
    """Seven members, of whom one colludes; everybody masked an update."""

    @pytest.fixture
    def malice(self) -> Malice:
        made = Malice(7, colluders=[6]).set_up()
        for rank in made.everybody:
            made.train(rank, 1)
        return made

    @settings(deadline=None, max_examples=25)
    @given(choices=st.lists(st.integers(0, 3), min_size=6, max_size=6))
    def test_however_members_are_divided(self, choices: list[int]) -> None:
        """Whoever is shown what, shares are released for one set at most, and single vectors stay noise."""
        malice = Malice(7, colluders=[6]).set_up()
        for rank in malice.everybody:
            malice.train(rank, 1)
        everybody = frozenset(range(7))
        sets = (everybody, everybody - {0}, everybody - {1}, everybody - {0, 1})
        views = {rank: sets[choice] for rank, choice in enumerate(choices)}
        outcomes = show(malice, 1, views)
        released = {views[rank] for rank, outcome in outcomes.items() if not outcome}
        assert len(released) <= 1
        never_both(malice, 1, range(6))
        for rank in range(6):
            assert looks_random(malice.peel([rank], 1))

    def test_a_client_both_alive_and_dropped(self, malice: Malice) -> None:
        """A set holds a member once or not at all; holders that are told one thing answer, or those told the other."""
        everybody = frozenset(range(7))
        twice = Agree(epoch=malice.epoch, index=1, survivors=(0, 1, 2, 3, 4, 5, 6)).to_bytes()[:-2] + b"\0\5"
        assert refused(lambda: malice.at(0).answer(twice)) == "format"
        views = {rank: everybody if rank % 2 else everybody - {2} for rank in range(6)} | {2: everybody}
        outcomes = show(malice, 1, views)
        never_both(malice, 1, [2])
        assert looks_random(malice.peel([2], 1))
        assert {views[rank] for rank, refusal in outcomes.items() if not refusal} == {everybody}

    def test_unmasking_twice_with_other_survivors(self, malice: Malice) -> None:
        """Once a set is stated, no other one gets a statement or a share; the same request gets the same bytes."""
        alive, fewer = frozenset(range(7)), frozenset(range(6))
        malice.open_round(1, alive)
        header = malice.headers[0, 1]
        for rank in range(6):
            assert refused(lambda r=rank: malice.state(r, 1, fewer)) == "statement"
            forged = {other: malice.forge(6, header, fewer) for other in range(6)}
            assert refused(lambda r=rank, f=forged: malice.unmask(r, 1, fewer, f)) == "statement"
        said = {rank: malice.state(rank, 1, alive) for rank in alive}
        request = Unmask(
            epoch=malice.epoch,
            index=1,
            survivors=tuple(sorted(alive)),
            signatures={rank: one.signature for rank, one in said.items()},
        ).to_bytes()
        assert malice.at(0).answer(request) == malice.at(0).answer(request)
        for size in (1, 2, 3, 4, 5):
            for some in combinations(range(6), size):
                assert looks_random(malice.peel(some, 1))
        assert (malice.peel(range(6), 1) == malice.truth(range(6))).all()

    def test_sets_that_are_too_small_or_not_of_this_round(self, malice: Malice) -> None:
        """Fewer than a quorum, a set without the signer, or with somebody who was not asked: no statement."""
        assert refused(lambda: malice.state(0, 1, [0, 1, 2, 6])) == "survivors"
        assert refused(lambda: malice.state(0, 1, [1, 2, 3, 4, 5, 6])) == "survivors"
        assert refused(lambda: malice.state(0, 1, range(8))) == "survivors"
        assert refused(lambda: malice.state(0, 2, range(7))) == "index"
        for rank in malice.everybody:
            malice.train(rank, 2, participants=range(6)) if rank < 6 else None
        assert refused(lambda: malice.state(0, 2, range(7))) == "survivors"
        assert refused(lambda: malice.state(0, 1, range(7))) == "index"

    def test_certificates_that_are_none(self, malice: Malice) -> None:
        """Too few signers, one signature under many names, signers outside of the set, other headers: no share."""
        alive = frozenset(range(6))
        said = {rank: malice.state(rank, 1, alive) for rank in range(6)}
        quorum = malice.shape.quorum
        few = dict(list(said.items())[: quorum - 1])
        assert refused(lambda: malice.unmask(0, 1, alive, few)) == "quorum"
        header = malice.headers[0, 1]
        copied = few | {5: malice.forge(6, header, alive)}
        assert refused(lambda: malice.unmask(0, 1, alive, copied)) == "signature"
        outside = few | {6: malice.forge(6, header, alive)}
        assert refused(lambda: malice.unmask(0, 1, alive, outside)) == "quorum"
        other = few | {5: malice.forge(6, bytes(32), alive)}
        assert refused(lambda: malice.unmask(0, 1, alive, other)) == "signature"
        nothing_is_known(malice, 1, range(6))


class TestRing:
    """On a ring, survivors that nobody speaks up for."""

    def test_a_silent_survivor_is_not_cut_off(self) -> None:
        """A member that fell silent after its upload is not left without neighbours: the others count them for it."""
        malice = shared_ring()
        index = malice.next_index()
        for rank in malice.everybody:
            malice.train(rank, index)
        victim = malice.circle.ring[0]
        near, least = malice.circle.neighbours[victim], malice.shape.least_neighbours
        gone = set(near[: len(near) - least + 1])
        alive = set(malice.everybody) - gone
        assert len(alive) >= malice.shape.fewest
        assert {refused(lambda r=rank: malice.state(r, index, alive)) for rank in alive - {victim}} == {"survivors"}
        nothing_is_known(malice, index, [victim])


def test_the_attack_has_teeth() -> None:
    """With as many colluders as the threshold the same program does open a vector: what it tries above is enough."""
    malice = Malice(7, colluders=[4, 5, 6], colluding=1).set_up()
    assert malice.shape.threshold <= 3
    for rank in malice.everybody:
        malice.train(rank, 1)
    assert malice.secret(escrow.SELF, 0, 1) is not None
    assert malice.secret(escrow.VAULT, 0, 1) is not None
    assert (malice.peel([0], 1) == malice.truth([0])).all()
