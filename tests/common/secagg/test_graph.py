"""Order, groups and neighbours follow from the names and the beacon alone; checked survivors are connected."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.graph import encapsulates, groups_of, least_neighbours_within, neighbours, order

names = st.sets(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=40)
beacons = st.binary(min_size=32, max_size=32)


def ring_of(size: int) -> tuple[str, ...]:
    """Names in the order of their places."""
    return tuple(f"{at:04d}" for at in range(size))


def pieces(members: Collection[str], graph: dict[str, tuple[str, ...]]) -> int:
    """How many parts members fall into that no edge between members joins."""
    left, count = set(members), 0
    while left:
        count, reached = count + 1, [left.pop()]
        while reached:
            near = left.intersection(graph[reached.pop()])
            left -= near
            reached.extend(near)
    return count


class TestOrder:
    @settings(deadline=None)
    @given(names, beacons)
    def test_depends_on_nothing_but_names_and_beacon(self, some: set[str], beacon: bytes) -> None:
        """However the names are listed, everybody finds the same order of all of them."""
        assert order(sorted(some), beacon) == order(sorted(some, reverse=True), beacon)
        assert sorted(order(some, beacon)) == sorted(some)

    def test_is_that_of_the_hashes(self) -> None:
        """SHA-256 over length-prefixed label, beacon and name, computed by hand."""
        beacon = bytes(range(32))

        def key(name: str) -> bytes:
            parts = (b"coterie secagg order v1", beacon, name.encode())
            return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()

        some = ring_of(20)
        assert order(some, beacon) == tuple(sorted(some, key=key))

    def test_changes_with_the_beacon(self) -> None:
        """Over 2,000 beacons every one of 4 members comes first about as often (6 standard deviations)."""
        first = Counter(order(ring_of(4), number.to_bytes(32, "big"))[0] for number in range(2000))
        assert all(abs(first[name] - 500) < 6 * 20 for name in ring_of(4))


class TestGroups:
    @settings(deadline=None)
    @given(names, st.integers(0, 50), beacons)
    def test_split_everybody_evenly(self, some: set[str], size: int, beacon: bytes) -> None:
        """Nobody is left out or twice in; groups have at least the size asked for and differ by at most one."""
        groups = groups_of(some, group_size=size, beacon=beacon)
        assert sorted(name for group in groups for name in group) == sorted(some)
        assert all(list(group) == sorted(group) for group in groups)
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(size, len(some))
        assert len(groups) == (max(len(some) // size, 1) if size else 1)

    def test_follow_the_beacon(self) -> None:
        """Members cannot choose their company: two members share a group about as often as chance has it."""
        together = sum(
            any({"0000", "0001"} <= set(group) for group in groups_of(ring_of(8), group_size=4, beacon=bytes([a, b])))
            for a, b in product(range(40), range(50))
        )
        assert abs(together - 2000 * 3 / 7) < 6 * (2000 * 3 / 7 * 4 / 7) ** 0.5

    def test_keep_the_rings_order_within(self) -> None:
        """The order of a group is the whole order without the others."""
        whole, beacon = order(ring_of(30), bytes(32)), bytes(32)
        for group in groups_of(ring_of(30), group_size=10, beacon=beacon):
            assert order(group, beacon) == tuple(name for name in whole if name in group)


class TestNeighbours:
    @pytest.mark.parametrize(("size", "degree"), [(5, 4), (6, 4), (6, 5), (9, 2), (10, 6), (130, 26)])
    def test_are_mutual_and_as_many_as_said(self, size: int, degree: int) -> None:
        """Masks of a pair cancel only if both apply them; nobody is its own neighbour."""
        graph = neighbours(ring_of(size), degree)
        for name, others in graph.items():
            assert len(set(others)) == len(others) == degree
            assert list(others) == sorted(others)
            assert name not in others
            assert all(name in graph[other] for other in others)

    def test_are_the_nearest_on_the_ring(self) -> None:
        """Half of them on each side, around the end."""
        ring = ("d", "a", "f", "c", "b", "e", "g")
        assert neighbours(ring, 4)["d"] == ("a", "e", "f", "g")
        assert neighbours(ring, 2)["c"] == ("b", "f")

    @settings(deadline=None)
    @given(st.integers(2, 24), st.data())
    def test_within_a_set_are_counted_as_by_hand(self, size: int, data: st.DataObject) -> None:
        """The sliding count is the count, for rings and complete graphs, and 0 for nobody."""
        ring = ring_of(size)
        degree = data.draw(st.sampled_from([*range(2, size - 1, 2), size - 1]))
        members = data.draw(st.sets(st.sampled_from(ring)))
        graph = neighbours(ring, degree)
        expected = min((len(members.intersection(graph[name])) for name in members), default=0)
        assert least_neighbours_within(ring, degree, members) == expected


class TestEncapsulation:
    @pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9, 100, 129])
    def test_is_one_of_each_pair_and_balanced(self, size: int) -> None:
        """Exactly one of two sends; nobody sends more than one ciphertext more than another."""
        sent = Counter()
        for i, j in combinations(range(size), 2):
            assert encapsulates(i, j, size) != encapsulates(j, i, size)
            sent[i if encapsulates(i, j, size) else j] += 1
        counts = [sent[i] for i in range(size)]
        assert max(counts) - min(counts) <= 1

    def test_is_never_to_oneself(self) -> None:
        """There is no pair of one."""
        assert not any(encapsulates(i, i, 10) for i in range(10))

    def test_is_towards_the_nearer_way_round(self) -> None:
        """The lower rank sends where both ways are as long."""
        assert [encapsulates(0, j, 6) for j in range(6)] == [False, True, True, True, False, False]


def colluders_spread(size: int, half: int, side: int) -> Iterator[frozenset[int]]:
    """All sets of colluders of which nobody has more than `side` among the next `half` members on either side."""
    for chosen in range(1 << size):
        flags = [chosen >> at & 1 for at in range(size)]
        if all(sum(flags[(at + step) % size] for step in range(1, half + 1)) <= side for at in range(size)):
            yield frozenset(at for at in range(size) if flags[at])


def accepted(ring: Sequence[str], degree: int, least: int) -> Iterator[frozenset[str]]:
    """All sets of survivors in which every one has at least so many neighbours: whatever a coordinator may drop."""
    for size in range(1, len(ring) + 1):
        for some in combinations(ring, size):
            if least_neighbours_within(ring, degree, some) >= least:
                yield frozenset(some)


class TestConnection:
    @pytest.mark.parametrize(("size", "degree", "side"), [(9, 4, 0), (10, 4, 0), (11, 6, 0), (11, 6, 1), (12, 8, 1)])
    def test_honest_survivors_are_connected(self, size: int, degree: int, side: int) -> None:
        """For every admissible set of survivors and every spread of colluders, checked one by one."""
        ring = ring_of(size)
        graph = neighbours(ring, degree)
        sets = list(accepted(ring, degree, degree // 2 + side + 1))
        assert len(sets) > 1
        for colluding in colluders_spread(size, degree // 2, side):
            bad = {ring[at] for at in colluding}
            assert all(pieces(survivors - bad, graph) <= 1 for survivors in sets)

    @pytest.mark.parametrize(("pattern", "degree", "side"), [("hhh..hhh..", 4, 0), ("hhhhc..hhhhc..", 6, 1)])
    def test_one_neighbour_fewer_would_not_do(self, pattern: str, degree: int, side: int) -> None:
        """The bound is the least: two gaps, with colluders (c) in them, part the honest (h) from one another."""
        ring = ring_of(len(pattern))
        survivors = {name for name, what in zip(ring, pattern, strict=True) if what != "."}
        honest = {name for name, what in zip(ring, pattern, strict=True) if what == "h"}
        assert least_neighbours_within(ring, degree, survivors) == degree // 2 + side
        assert pieces(honest, neighbours(ring, degree)) == 2

    def test_a_member_that_is_cut_off_is_noticed_by_all(self) -> None:
        """All neighbours of one survivor are dropped: the others' own neighbours are plenty, the check is for all."""
        ring = ring_of(200)
        graph = neighbours(ring, 30)
        survivors = set(ring) - set(graph["0100"])
        own = min(len(survivors.intersection(graph[name])) for name in survivors - {"0100"})
        assert least_neighbours_within(ring, 30, survivors) == 0
        assert own >= 15
        assert least_neighbours_within(ring, 30, survivors - {"0100"}) == own

    @settings(deadline=None, max_examples=200)
    @given(st.integers(7, 12), st.data())
    def test_two_admissible_sets_share_honest_neighbours(self, size: int, data: st.DataObject) -> None:
        """A member within both has more neighbours in common to them than can collude: one pair's mask stays secret."""
        ring, degree = ring_of(size), 6 if size > 7 else 4
        side = data.draw(st.integers(0, degree // 2 - 1))
        sets = list(accepted(ring, degree, degree // 2 + side + 1))
        one, two = data.draw(st.sampled_from(sets)), data.draw(st.sampled_from(sets))
        graph = neighbours(ring, degree)
        assert all(len(one.intersection(two, graph[name])) > 2 * side for name in one & two)
