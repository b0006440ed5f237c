"""Every way to show a small ring two headers at one index, tried out: why a ring's threshold is half of its degree.

Some members (the odd ones) begin a header of their own, with participants that the coordinator chooses for them; the
rest begin another one and state a survivor set that may name odd ones, who fell silent. A vector is laid bare, alone or
in a sum of odd ones, if its self mask's secret comes out and every mask of a pair is known or cancels in the sum. Here
is who learns what, without any cryptography: neighbours as bits, `threshold` releasing holders open a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

from common.secagg.graph import neighbours
from common.secagg.parameters import quorum, shape_of
from tests.helpers.secagg import rules

Bits = np.ndarray


def around(size: int, degree: int) -> list[int]:
    """Each member's neighbours, as bits."""
    names = [f"{place:02}" for place in range(size)]
    near = neighbours(names, degree)
    return [sum(1 << names.index(other) for other in near[name]) for name in names]


def count(bits: Bits | int) -> Bits:
    """How many bits are set in each number."""
    return np.bitwise_count(np.asarray(bits, np.uint32)).astype(np.int64)


def laid_bare(size: int, degree: int, *, threshold: int, least: int, colluder: int = -1) -> Iterator[tuple[int, ...]]:
    """Odd members (up to three), survivors and participants with which somebody's vector comes out.

    Args:
        size: Members of the ring.
        degree: Neighbours of each.
        threshold: Holders that open a secret.
        least: Fewest neighbours that a member insists on, in its participants and for every survivor.
        colluder: A member that gives both kinds of shares and knows its pairs' keys; -1 for none.
    """
    near, everybody = around(size, degree), range(size)
    helps = 1 << colluder if colluder >= 0 else 0
    least_signers = quorum(size, int(colluder >= 0))
    sets = np.arange(1 << size, dtype=np.uint32)
    large = sets[count(sets) >= least_signers]
    admissible = np.ones(len(large), bool)
    for i in everybody:
        admissible &= ((large >> i & 1) == 0) | (count(large & near[i]) >= least)
    for odd in (set(some) | {0} for extra in (0, 1, 2) for some in combinations(range(1, size), extra)):
        if colluder in odd:
            continue
        mine = sum(1 << i for i in odd)
        asked = large[(large & mine) == mine]
        for i in odd:
            asked = asked[count(asked & near[i]) >= least]
        for alive in map(int, large[admissible & (count(large & ~np.uint32(mine)) >= least_signers)]):
            release = alive & ~mine | helps
            opened = [int(count(near[i] & release)) >= threshold for i in everybody]
            known = helps | sum(1 << i for i in everybody if opened[i] and not alive >> i & 1)
            bare = np.full(len(asked), sum(1 << i for i in odd if opened[i] and alive >> i & 1), np.uint32)
            for i in sorted(odd) * len(odd):  # who shares an unknown mask with somebody outside of the sum is not in it
                outside = near[i] & asked & ~np.uint32(known) & ~bare
                bare = np.where((outside != 0) & (bare >> i & 1 == 1), bare & ~np.uint32(1 << i), bare)
            for participants in asked[bare != 0]:
                yield mine, alive, int(participants)


@pytest.mark.parametrize(("size", "degree"), [(12, 4), (11, 6)])
def test_half_of_the_degree_is_enough(size: int, degree: int) -> None:
    """With as many shares to a secret nothing comes out, whatever is shown to whom."""
    assert next(laid_bare(size, degree, threshold=degree // 2, least=degree // 2 + 1), None) is None


@pytest.mark.parametrize(("size", "degree"), [(12, 4), (11, 6)])
def test_one_share_less_is_not(size: int, degree: int) -> None:
    """Then the sum of three comes out: those who open it are all outside of the three's own participants."""
    found = next(laid_bare(size, degree, threshold=degree // 2 - 1, least=degree // 2 + 1), None)
    assert found is not None


@pytest.mark.parametrize("colluder", [1, 3, 5])
def test_a_colluder_on_a_side_takes_one_share_more(colluder: int) -> None:
    """With one colluder the threshold is one higher, and so is the fewest neighbours; nothing comes out."""
    bare = laid_bare(12, 6, threshold=4, least=5, colluder=colluder)
    assert next(bare, None) is None


@pytest.mark.parametrize(("members", "colluding"), [(129, 0), (130, 1), (400, 20), (1000, 50)])
def test_that_is_what_everybody_computes(members: int, colluding: int) -> None:
    """Threshold and fewest neighbours of real rings are those of above."""
    shape = shape_of(members, rules=rules(colluding=colluding))
    side = shape.least_neighbours - shape.degree // 2 - 1
    assert shape.threshold >= shape.degree // 2 + side
