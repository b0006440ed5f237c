"""Who shares masks with whom: a random order that nobody chose, groups, and a ring of neighbours.

Everybody computes this from the roster and the beacon; nothing of it is told by the coordinator.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from common.secagg.keys import digest

Label = TypeVar("Label", str, int)


def order(names: Collection[str], beacon: bytes) -> tuple[str, ...]:
    """Names in the order of their hashes under the beacon, which every member helped to draw after the roster stood."""
    return tuple(sorted(names, key=lambda name: digest("order", beacon, name.encode())))


def groups_of(names: Collection[str], *, group_size: int, beacon: bytes) -> tuple[tuple[str, ...], ...]:
    """Groups of at least `group_size` members, whose sizes differ by at most 1; each sorted by name.

    A size of 0, or more than there are names, makes one group of all. More than one group needs a beacon.
    """
    count = len(names) // group_size if group_size else 1
    if count <= 1:
        return (tuple(sorted(names)),)
    ordered = order(names, beacon)
    cuts = [len(ordered) * i // count for i in range(count + 1)]
    return tuple(tuple(sorted(ordered[a:b])) for a, b in pairwise(cuts))


def neighbours(ring: Sequence[Label], degree: int) -> dict[Label, tuple[Label, ...]]:
    """Each member's neighbours, sorted: the `degree` / 2 next ones on each side of the ring, or all others.

    Args:
        ring: The members of a group in the beacon's order, by name or by rank.
        degree: Even, or one less than there are members.
    """
    size = len(ring)
    if degree >= size - 1:
        return {name: tuple(sorted(other for other in ring if other != name)) for name in ring}
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {name: tuple(sorted(ring[(at + step) % size] for step in steps)) for at, name in enumerate(ring)}


def least_neighbours_within(ring: Sequence[Label], degree: int, members: Collection[Label]) -> int:
    """The fewest neighbours within `members` that any of `members` has.

    Every signer of a survivor set asks this for all survivors, not for itself alone: a survivor that nobody checked can
    be cut off from the others by naming its neighbours as dropped.
    """
    size, inside = len(ring), [name in members for name in ring]
    if degree >= size - 1:
        return max(sum(inside) - 1, 0)
    half = degree // 2
    sums = list(accumulate((inside[at % size] for at in range(-half, size + half)), initial=0))
    counts = (sums[at + degree + 1] - sums[at] - 1 for at in range(size) if inside[at])
    return min(counts, default=0)


def encapsulates(i: int, j: int, size: int) -> bool:
    """Whether the member of rank i encapsulates a key to the one of rank j; exactly one of the two does.

    Everybody encapsulates to about as many as encapsulate to it.
    """
    distance = (j - i) % size
    return 0 < 2 * distance < size or (2 * distance == size and i < j)
