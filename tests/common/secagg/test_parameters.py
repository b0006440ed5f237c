"""The numbers of a group keep what they promise, are the same everywhere, and weak ones are refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import exp, lgamma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import parameters
from common.secagg.parameters import Rules, Shape, largest_group, needs_beacon, quorum, shape_of
from common.secagg.refusal import SecAggError

RULES = Rules(
    run_id=bytes(16),
    config_digest=bytes(32),
    epoch_rounds=16,
    honest=2,
    colluding=1,
    min_survivors=1,
    smallest_cohort=3,
    group_size=0,
    bits=32,
)

shapes = st.tuples(st.integers(3, 400), st.integers(0, 40)).filter(lambda pair: pair[0] >= pair[1] + 2)


def shape(members: int, colluding: int) -> Shape:
    """The shape of a group under otherwise usual rules."""
    return shape_of(members, rules=replace(RULES, colluding=colluding))


class TestRules:
    def test_digest_covers_every_field(self) -> None:
        """Whoever changes a modulus, a threshold or a group's size has other rules."""
        others = [
            replace(RULES, run_id=bytes(15) + b"\1"),
            replace(RULES, config_digest=bytes(31) + b"\1"),
            *(replace(RULES, **{name: getattr(RULES, name) + 1}) for name in Rules.__slots__[2:]),
        ]
        assert len({rules.digest for rules in [RULES, *others]}) == 1 + len(Rules.__slots__)

    def test_digest_is_a_hash_and_nothing_else(self) -> None:
        """Equal rules have equal digests, of 32 bytes."""
        assert RULES.digest == replace(RULES).digest
        assert len(RULES.digest) == 32

    def test_the_fewest_of_a_sum_are_honest_and_colluding_ones_together(self) -> None:
        """A run may ask for more; of groups it asks no more than that each hides its members."""
        assert replace(RULES, honest=3, colluding=2).fewest == 5
        assert replace(RULES, min_survivors=9).fewest == 9
        assert replace(RULES, min_survivors=9, group_size=4).fewest == 3

    def test_groups_and_rings_need_a_beacon(self) -> None:
        """A complete graph of everybody looks the same in any order."""
        assert [needs_beacon(RULES, n) for n in (3, 128, 129)] == [False, False, True]
        assert needs_beacon(replace(RULES, group_size=4), 8)


class TestQuorum:
    @pytest.mark.parametrize(("members", "colluding"), [(n, c) for n in range(3, 8) for c in range(n - 1)])
    def test_two_of_them_share_an_honest_member(self, members: int, colluding: int) -> None:
        """Checked for all pairs of quorums: more are in both than collude; one signer fewer would not do."""
        size = quorum(members, colluding)
        assert size <= members
        some = [set(chosen) for chosen in combinations(range(members), size)]
        assert all(len(a & b) > colluding for a in some for b in some)
        fewer = [set(chosen) for chosen in combinations(range(members), size - 1)]
        assert any(len(a & b) <= colluding for a in fewer for b in fewer)

    @pytest.mark.parametrize(("members", "colluding"), [(n, c) for n in range(3, 9) for c in range(n - 1)])
    def test_participants_of_another_header_share_one_more(self, members: int, colluding: int) -> None:
        """A member that masked for other participants than the signers' keeps a pair with an honest signer."""
        fewest = shape(members, colluding).fewest if members >= colluding + 2 else members
        for signers in combinations(range(1, members), quorum(members, colluding)):
            for others in combinations(range(1, members), fewest - 1):  # member 0 is one of them, and signs nothing
                assert len(set(signers) & set(others)) > colluding

    @settings(deadline=None)
    @given(st.integers(2, 60_000), st.integers(0, 60_000))
    def test_is_more_than_half_of_members_and_colluders(self, members: int, colluding: int) -> None:
        """The least number above it."""
        assert quorum(members, colluding) > Fraction(members + colluding, 2) >= quorum(members, colluding) - 1


class TestShape:
    @pytest.mark.parametrize(
        ("members", "colluding", "expected"),
        [
            (3, 1, (2, 2, 3, 3, 0)),
            (4, 1, (3, 2, 3, 3, 0)),
            (10, 1, (9, 4, 6, 6, 0)),
            (10, 5, (9, 6, 8, 8, 0)),
            (100, 1, (99, 34, 51, 51, 0)),
            (128, 33, (127, 43, 81, 81, 0)),
            (129, 1, (26, 14, 66, 66, 15)),
            (1000, 1, (40, 21, 501, 501, 22)),
            (1000, 50, (102, 71, 526, 526, 72)),
            (1000, 100, (132, 96, 551, 551, 97)),
            (10000, 500, (128, 89, 5251, 5251, 90)),
        ],
    )
    def test_has_known_values(self, members: int, colluding: int, expected: tuple[int, ...]) -> None:
        """Degree, threshold, quorum, fewest and least neighbours: a change here breaks every federation."""
        got = shape(members, colluding)
        assert (got.degree, got.threshold, got.quorum, got.fewest, got.least_neighbours) == expected
        assert got.complete == (expected[0] == members - 1)

    @settings(deadline=None)
    @given(shapes)
    def test_threshold_lies_between_colluders_and_holders(self, pair: tuple[int, int]) -> None:
        """Colluding holders are too few, all holders are enough."""
        members, colluding = pair
        got = shape(members, colluding)
        assert 2 <= got.threshold <= got.degree <= members - 1
        assert got.threshold > (colluding if got.complete else 2 * (got.least_neighbours - got.degree // 2 - 1))
        assert got.fewest >= got.quorum > (members + colluding) / 2

    @settings(deadline=None)
    @given(st.integers(129, 3000), st.integers(0, 60))
    def test_holders_that_open_a_secret_are_not_all_outside_of_a_round(self, members: int, colluding: int) -> None:
        """On a ring: fewer neighbours may be missing from a round than there are honest ones among `threshold`."""
        got = shape(members, colluding)
        if not got.complete:
            side = got.least_neighbours - got.degree // 2 - 1
            assert got.degree - got.least_neighbours < got.threshold - 2 * side

    @settings(deadline=None)
    @given(shapes)
    def test_survivors_that_all_answer_can_be_opened(self, pair: tuple[int, int]) -> None:
        """Each admissible survivor has enough holders among the others."""
        got = shape(*pair)
        assert (got.fewest - 1 if got.complete else got.least_neighbours) >= got.threshold

    @settings(deadline=None)
    @given(shapes)
    def test_more_colluders_never_lower_a_number(self, pair: tuple[int, int]) -> None:
        """Nothing is won by assuming more of them."""
        members, colluding = pair
        if members < colluding + 3:
            return
        less, more = shape(members, colluding), shape(members, colluding + 1)
        assert less.threshold <= more.threshold
        assert less.quorum <= more.quorum
        assert less.degree <= more.degree

    def test_few_sites_can_lose_one(self) -> None:
        """With one colluder assumed, four sites open a sum of three."""
        assert shape(4, 1).fewest == 3

    def test_where_too_many_collude_for_a_ring_all_are_neighbours(self) -> None:
        """A ring is taken only where it is smaller than a complete graph."""
        got = shape(130, 100)
        assert got.complete
        assert got.threshold == 101

    @pytest.mark.parametrize("members", [0, 1, 2, 1 << 17])
    def test_too_few_or_too_many_members_are_refused(self, members: int) -> None:
        """Two members would learn each other's update from the sum."""
        with pytest.raises(SecAggError) as refused:
            shape(members, 0)
        assert refused.value.reason == "roster"

    def test_all_but_one_cannot_collude(self) -> None:
        """Whoever is alone among colluders has nobody to hide behind; no threshold helps."""
        with pytest.raises(SecAggError) as refused:
            shape_of(3, rules=replace(RULES, honest=1, colluding=2))
        assert refused.value.reason == "threshold"

    @pytest.mark.parametrize(("name", "value"), [("honest", 6), ("min_survivors", 7), ("smallest_cohort", 7)])
    def test_members_are_as_many_as_the_rules_ask_for(self, name: str, value: int) -> None:
        """Each of them is a lower bound by itself."""
        assert shape_of(7, rules=replace(RULES, **{name: value})).members == 7
        with pytest.raises(SecAggError):
            shape_of(6, rules=replace(RULES, **{name: value}))


class TestRing:
    @pytest.mark.parametrize(("members", "colluding", "half"), [(9, 3, 2), (10, 4, 3), (12, 5, 4), (8, 2, 3)])
    @pytest.mark.parametrize("bits", [0, 1, 2, 4])
    def test_colluders_on_a_side_are_bounded_as_by_trying_all(
        self, monkeypatch: pytest.MonkeyPatch, members: int, colluding: int, half: int, bits: int
    ) -> None:
        """All places of the colluders are tried; the bound is the least that is rarer than the limit."""
        places = list(combinations(range(members - 1), colluding))

        def chance(x: int) -> Fraction:
            more = sum(sum(place < half for place in chosen) > x for chosen in places)
            return 2 * members * Fraction(more, len(places))

        monkeypatch.setattr(parameters, "_SECURITY_BITS", bits)
        expected = next(x for x in range(colluding + 1) if chance(x) < Fraction(1, 2**bits))
        assert parameters._colluders_on_a_side(members, colluding, half) == expected

    @pytest.mark.parametrize(("members", "colluding"), [(129, 1), (200, 10), (1000, 50), (1000, 100), (10000, 500)])
    def test_keeps_its_promises_by_another_computation(self, members: int, colluding: int) -> None:
        """In floating point: the chance of too many colluders on a side, and of too few neighbours after drops."""
        got = shape(members, colluding)
        half, side = got.degree // 2, got.least_neighbours - got.degree // 2 - 1
        assert 2 * members * above(members - 1, colluding, half, side) < 2**-40
        need = max(got.threshold, got.least_neighbours)
        assert members * above(members - 1, members // 10, got.degree, got.degree - need) < 2**-20

    @pytest.mark.parametrize(("members", "colluding"), [(129, 1), (1000, 50)])
    def test_has_the_least_degree(self, members: int, colluding: int) -> None:
        """Two neighbours fewer miss one promise or the other."""
        degree = shape(members, colluding).degree - 2
        side = parameters._colluders_on_a_side(members, colluding, degree // 2)
        need = max(2, 2 * side + 1, degree // 2 + side + 1)
        assert need > degree or not parameters._rarely_too_few(members, degree, need)


@pytest.mark.parametrize(
    ("strategy", "clients", "bad", "expected"),
    [
        ("fedmedian", 100, 5, 9),
        ("fedtrimmedavg", 100, 5, 9),
        ("krum", 100, 5, 7),
        ("multikrum", 100, 5, 7),
        ("bulyan", 100, 5, 4),
        ("bulyan", 22, 5, 0),
        ("fedmedian", 10, 0, 10),
        ("krum", 4, 1, 0),
    ],
)
def test_the_largest_group_leaves_enough_good_groups(strategy: str, clients: int, bad: int, expected: int) -> None:
    """One member more, and the groups were too few for the bad ones."""
    needed = {"krum": 2 * bad + 3, "multikrum": 2 * bad + 3, "bulyan": 4 * bad + 3}.get(strategy, 2 * bad + 1)
    size = largest_group(clients, bad, strategy=strategy)
    assert size == expected
    assert size == 0 or clients // size >= needed
    assert clients // (size + 1) < needed


def above(others: int, marked: int, drawn: int, x: int) -> float:
    """Chance that more than x of `drawn` are among `marked` of `others`, by logarithms of factorials."""

    def ways(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    most = min(marked, drawn)
    return sum(
        exp(ways(marked, y) + ways(others - marked, drawn - y) - ways(others, drawn)) for y in range(x + 1, most + 1)
    )
