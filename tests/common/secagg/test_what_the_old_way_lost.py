"""What secure aggregation in two trips lost, shown on a model of it in a few lines; the same server fails against ours.

The model masks as ours does, and its holders make the checks that are commonly made: oneself among the survivors,
survivors among the participants, enough of them, one answer a round, never both secrets of one member. What it lacks is
an agreement on the survivors. A server that shows every holder another set recovers updates exactly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.helpers.secagg_malice import Malice, looks_random, refused
from tests.helpers.secagg_views import complete, ring, views_against

PRIME = 2**127 - 1
SIZE = 8
HEADER = b"one round"


def stream(key: int, label: str) -> np.ndarray:
    """A mask: uint32[SIZE]."""
    seed = key.to_bytes(16, "big") + label.encode() + HEADER
    return np.frombuffer(hashlib.shake_256(seed).digest(4 * SIZE), np.uint32)


def secret() -> int:
    return int.from_bytes(os.urandom(16), "big") % PRIME


def split(value: int, places: Sequence[int], threshold: int) -> dict[int, int]:
    """Shamir shares of a secret by holder."""
    coefficients = [value, *(secret() for _ in range(threshold - 1))]
    return {x: sum(c * pow(x + 1, e, PRIME) for e, c in enumerate(coefficients)) % PRIME for x in places}


def combine(shares: Mapping[int, int]) -> int:
    """The secret, from as many shares as the threshold or more."""
    total = 0
    for x, share in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = weight * (other + 1) * pow(other - x, -1, PRIME) % PRIME
        total += share * weight
    return total % PRIME


@dataclass
class OldMember:
    """A member of the two-trip form: it masks, and gives one share of each neighbour, once."""

    name: int
    neighbours: Sequence[int]
    threshold: int
    self_key: int = field(default_factory=secret)
    vault_key: int = field(default_factory=secret)
    pairs: dict[int, int] = field(default_factory=dict)
    held: dict[int, tuple[int, int]] = field(default_factory=dict)
    answered: bool = False

    def mask(self, update: np.ndarray) -> np.ndarray:
        """The update under the member's own mask and those it shares."""
        masked = update + stream(self.self_key, "self")
        for other, key in self.pairs.items():
            masked = masked + stream(key, "pair") if self.name < other else masked - stream(key, "pair")
        return masked

    def unmask(self, survivors: frozenset[int], participants: frozenset[int]) -> dict[int, tuple[str, int]]:
        """A share of each neighbour: of its own mask if it survived, of the key to its vault if not."""
        near = survivors & set(self.neighbours)
        if self.name not in survivors or not survivors <= participants or len(near) < self.threshold or self.answered:
            raise PermissionError
        self.answered = True
        return {j: ("self", shares[0]) if j in survivors else ("vault", shares[1]) for j, shares in self.held.items()}


class OldFederation:
    """Members of the two-trip form after their set-up, and what a server has: masked vectors and vaults."""

    def __init__(self, graph: Mapping[int, Sequence[int]], threshold: int) -> None:
        self.graph, self.threshold = graph, threshold
        self.members = {i: OldMember(i, near, threshold) for i, near in graph.items()}
        for i, member in self.members.items():
            for j in member.neighbours:
                if i < j:
                    member.pairs[j] = self.members[j].pairs[i] = secret()
            shares = [split(key, member.neighbours, threshold) for key in (member.self_key, member.vault_key)]
            for j in member.neighbours:
                self.members[j].held[i] = (shares[0][j], shares[1][j])
        rng = np.random.default_rng(7)
        self.updates = {i: rng.integers(0, 1000, SIZE, dtype=np.uint32) for i in graph}
        self.masked = {i: member.mask(self.updates[i]) for i, member in self.members.items()}
        self._vaults = {i: dict(member.pairs) for i, member in self.members.items()}

    def open_vault(self, name: int, key: int) -> dict[int, int]:
        """What is in a vault, for whoever has its key."""
        assert key == self.members[name].vault_key
        return self._vaults[name]


class OldServer:
    """A server that asks with one set of survivors a holder, and counts what it was given."""

    def __init__(self, federation: OldFederation, colluders: frozenset[int]) -> None:
        self._federation, self._colluders = federation, colluders
        self._shares: dict[tuple[str, int], dict[int, int]] = {}

    def ask(self, views: Mapping[int, frozenset[int]]) -> None:
        """Every honest holder answers its own set; colluders give both shares of everybody."""
        everybody = frozenset(self._federation.graph)
        for holder, view in views.items():
            for j, (kind, share) in self._federation.members[holder].unmask(view, everybody).items():
                self._shares.setdefault((kind, j), {})[holder] = share
        for holder in self._colluders:
            for j, (own, vault) in self._federation.members[holder].held.items():
                self._shares.setdefault(("self", j), {})[holder] = own
                self._shares.setdefault(("vault", j), {})[holder] = vault

    def key(self, kind: str, name: int) -> int | None:
        """A member's secret, if enough holders gave a share."""
        shares = self._shares.get((kind, name), {})
        chosen = dict(list(shares.items())[: self._federation.threshold])
        return combine(chosen) if len(chosen) == self._federation.threshold else None

    def sum_of(self, victims: frozenset[int]) -> np.ndarray | None:
        """The sum of the victims' updates; None while a mask is missing."""
        federation, total = self._federation, np.zeros(SIZE, np.uint32)
        for i in victims:
            own = self.key("self", i)
            if own is None:
                return None
            total += federation.masked[i] - stream(own, "self")
            for j in set(federation.graph[i]) - victims:
                key = self._pair(i, j)
                if key is None:
                    return None
                total = total - stream(key, "pair") if i < j else total + stream(key, "pair")
        return total

    def _pair(self, i: int, j: int) -> int | None:
        """The key that a victim shares with another member: a colluder's word, or out of an opened vault."""
        if j in self._colluders:
            return self._federation.members[j].pairs[i]
        key = self.key("vault", j)
        return None if key is None else self._federation.open_vault(j, key)[i]


@dataclass(frozen=True)
class Case:
    """A federation, the threshold of the two-trip form for it, and whom the server is after."""

    graph: Mapping[int, Sequence[int]]
    threshold: int
    colluders: frozenset[int]
    victims: frozenset[int]


CASES: dict[str, Callable[[], Case]] = {
    "regular graph, nobody colludes": lambda: Case(ring(60, 24), 13, frozenset(), frozenset({0})),
    "complete graph, 6 of 20 collude": lambda: Case(
        complete(20), 13, frozenset(range(14, 20)), frozenset({0, 1})
    ),
    "regular graph, 5 % collude": lambda: Case(
        ring(100, 24), 14, frozenset({7, 30, 50, 70, 90}), frozenset({0, 1, 2})
    ),
}  # fmt: skip
"""The three cases of the attack, scaled down to what a test can hold. With these thresholds two sets of holders, each
as large as the threshold and with the colluders in both, do not fit among all holders: 2 t > K + c."""


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def _views(case: Case) -> dict[int, frozenset[int]]:
    return views_against(case.victims, graph=case.graph, threshold=case.threshold, colluders=case.colluders)


def test_an_honest_server_learns_the_sum_of_all(case: Case) -> None:
    """The model is not broken by construction: one set for everybody opens the sum of everybody's updates."""
    federation = OldFederation(case.graph, case.threshold)
    server = OldServer(federation, frozenset())
    everybody = frozenset(case.graph)
    server.ask(dict.fromkeys(case.graph, everybody))
    total = server.sum_of(everybody)
    assert total is not None
    assert (total == sum(federation.updates.values()).astype(np.uint32)).all()
    assert server.sum_of(case.victims) is None


def test_every_holder_is_content(case: Case) -> None:
    """The sets that the server shows pass all checks of the two-trip form, each by itself."""
    for holder, view in _views(case).items():
        assert holder in view
        assert len(view & set(case.graph[holder])) >= case.threshold


def test_another_set_for_each_holder_lays_updates_bare(case: Case) -> None:
    """The two-trip form: victims' updates come out exactly, though every holder made its checks and answered once."""
    federation = OldFederation(case.graph, case.threshold)
    server = OldServer(federation, case.colluders)
    server.ask(_views(case))
    total = server.sum_of(case.victims)
    assert total is not None
    assert (total == sum(federation.updates[i] for i in case.victims)).all()


def test_the_same_sets_get_nothing_from_ours() -> None:
    """Real members, the complete graph with six colluders, the very sets of above: no share is released for any."""
    case = CASES["complete graph, 6 of 20 collude"]()
    malice = Malice(20, colluders=case.colluders, colluding=6).set_up()
    for rank in malice.everybody:
        malice.train(rank, 1)
    views = _views(case)
    said = {rank: malice.state(rank, 1, view) for rank, view in views.items()}
    for rank, view in views.items():
        same = {other: one for other, one in said.items() if one.survivors == tuple(sorted(view))}
        same |= {other: malice.forge(other, malice.headers[rank, 1], view) for other in case.colluders & view}
        assert refused(lambda r=rank, v=view, c=same: malice.unmask(r, 1, v, c)) == "quorum"
    assert malice.shares == {}
    assert looks_random(malice.peel(case.victims, 1))
