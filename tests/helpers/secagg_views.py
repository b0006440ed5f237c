"""A server that shows every holder other survivors: which sets it must show, so that nobody has cause to refuse.

For each of the victims' neighbours the server needs as many holders as the threshold that take it for dropped, while
every holder still sees enough of its own neighbours alive. Who shows whom as dropped is an assignment, found by
augmenting paths. It knows nothing of either protocol: a graph, a threshold, who colludes and who is to be laid bare.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Graph = Mapping[int, Sequence[int]]


def complete(size: int) -> dict[int, list[int]]:
    """Everybody is everybody's neighbour."""
    return {i: [j for j in range(size) if j != i] for i in range(size)}


def ring(size: int, degree: int) -> dict[int, list[int]]:
    """Each has the `degree` / 2 next ones on each side."""
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {i: sorted((i + step) % size for step in steps) for i in range(size)}


def views_against(
    victims: Collection[int], *, graph: Graph, threshold: int, colluders: Collection[int]
) -> dict[int, frozenset[int]]:
    """The survivors that each honest holder is shown.

    Every holder sees at least `threshold` of its neighbours alive, itself and all victims among the survivors.

    Raises:
        ValueError: No such views are possible.
    """
    honest = sorted(set(graph) - set(colluders))
    outer = {j for victim in victims for j in graph[victim]} - set(victims) - set(colluders)
    dropped: dict[int, set[int]] = {holder: set() for holder in honest}
    for j in sorted(outer):
        for _ in range(threshold - len(set(graph[j]) & set(colluders))):
            if not _assign(j, dropped, graph, threshold, set()):
                raise ValueError("no views lay these victims bare")
    return {holder: frozenset(graph) - shown for holder, shown in dropped.items()}


def _assign(j: int, dropped: dict[int, set[int]], graph: Graph, threshold: int, tried: set[int]) -> bool:
    """Find one more holder that takes j for dropped; others may have to change what they were to be shown."""
    for holder in sorted(set(graph[j]) & set(dropped), key=lambda holder: len(dropped[holder])):
        if j in dropped[holder] or holder in tried:
            continue
        tried.add(holder)
        if len(dropped[holder]) < len(graph[holder]) - threshold:
            dropped[holder].add(j)
            return True
        for other in sorted(dropped[holder]):
            dropped[holder] ^= {j, other}
            if _assign(other, dropped, graph, threshold, tried):
                return True
            dropped[holder] ^= {j, other}
    return False
