"""Balanced cohorts out of very many clients: only those who are a turn ahead of the others are remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from common.names import SortedNames

_CLIENTS, _DONE = "@clients", "@turns"
"""Keys of a saved state beside names; no client has such a name."""

_ONCE: Final = 1

Places = NDArray[np.int64]


@dataclass(slots=True)
class Turns:
    """How often each of `clients` took part, where the counts of any two differ by one at most.

    Attributes:
        clients: How many there are.
        done: How often everybody took part.
        ahead: int64[k], ascending: the places of those who took part once more.
    """

    clients: int
    done: int = 0
    ahead: Places = field(default_factory=lambda: np.empty(0, np.int64))

    def take(self, size: int, rng: np.random.Generator) -> Places:
        """The places (int64[size], ascending) of a cohort, which counts as having taken part.

        Those who took part least often go first; among equals chance decides.
        """
        behind = self.clients - len(self.ahead)
        first = besides(self.ahead, drawn(behind, min(size, behind), rng))
        if size < behind:
            self.ahead = np.union1d(self.ahead, first)
            return first
        again = besides(first, drawn(self.clients - behind, size - behind, rng))
        self.done, self.ahead = self.done + 1, again
        return np.union1d(first, again)

    def state(self, names: SortedNames) -> dict[str, int]:
        """What a checkpoint keeps: so many numbers as clients are ahead."""
        return {_CLIENTS: self.clients, _DONE: self.done, **{names[place]: _ONCE for place in self.ahead.tolist()}}

    @staticmethod
    def saved(state: Mapping[str, int]) -> bool:
        """Whether a state is of this kind."""
        return _CLIENTS in state

    @classmethod
    def restored(cls, state: Mapping[str, int], names: SortedNames) -> Self | None:
        """What a state says of these clients; None where it is of others."""
        places = [names.place(name) for name in state if name not in {_CLIENTS, _DONE}]
        known = sorted(place for place in places if place is not None)
        if len(known) < len(places) or state[_CLIENTS] != len(names):
            return None
        return cls(clients=len(names), done=state.get(_DONE, 0), ahead=np.array(known, np.int64))


def drawn(count: int, size: int, rng: np.random.Generator) -> Places:
    """int64[size], ascending: distinct numbers below `count`, every choice as likely; memory grows with `size`."""
    return np.sort(rng.choice(count, size, replace=False, shuffle=False).astype(np.int64))


def besides(taken: Places, ranks: Places) -> Places:
    """The numbers at `ranks` (ascending) among all whole numbers from 0 that are not in `taken` (ascending)."""
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")
