"""Clients at work, with the models that they began with: what an asynchronous run keeps from step to step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import RunError
from server.job import Arrays

_LIST: Final = "at-work.json"
"""Array of the state that holds everything but models: uint8[n], JSON."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Base:
    """A model that clients at work began with.

    Attributes:
        server_round: The round in which it was the model.
        arrays: Its own copy of the weights, which is shared by all who began with it.
        cohort: Names that were told to those who were asked then, as JSON; empty where none were.
    """

    server_round: int
    arrays: Arrays
    cohort: str = ""


@dataclass(slots=True)
class Member:
    """A client at work.

    Attributes:
        name: Its name.
        server_round: The round in which it was asked.
        order: By what the grid knows the order; empty before it was sent by this process.
    """

    name: str
    server_round: int
    order: str = ""


@dataclass(slots=True)
class AtWork:
    """Who is at work, in the order in which they were asked.

    Guarantee: a base is kept exactly as long as somebody is at work who began with it.
    """

    members: dict[str, Member] = field(default_factory=dict)
    bases: dict[int, Base] = field(default_factory=dict)
    _on: Counter[int] = field(init=False)
    """How many began with each base."""

    def __post_init__(self) -> None:
        self._on = Counter(member.server_round for member in self.members.values())

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __len__(self) -> int:
        return len(self.members)

    def begin(self, names: Iterable[str], base: Base) -> list[Member]:
        """Clients that are not at work begin with a model."""
        new = [Member(name=name, server_round=base.server_round) for name in names]
        if new:
            self.bases[base.server_round] = base
            self.members |= {member.name: member for member in new}
            self._on[base.server_round] += len(new)
        return new

    def end(self, name: str) -> None:
        """A client is at work no more."""
        began = self.members.pop(name).server_round
        self._on[began] -= 1
        if not self._on[began]:
            del self._on[began], self.bases[began]

    def clear(self) -> None:
        """Nobody is at work any more."""
        self.members.clear()
        self.bases.clear()
        self._on.clear()

    def begun_before(self, server_round: int) -> list[str]:
        """Names of those who were asked before a round."""
        return [member.name for member in self.members.values() if member.server_round < server_round]

    def state(self) -> dict[str, NDArray[Any]]:
        """All of it as flat named arrays, but for the grid's names of orders, which end with the process."""
        document = {
            "members": [[member.name, member.server_round] for member in self.members.values()],
            "bases": {str(number): {"cohort": base.cohort, "keys": list(base.arrays)}
                      for number, base in self.bases.items()},
        }  # fmt: skip
        state: dict[str, NDArray[Any]] = {_LIST: np.frombuffer(json.dumps(document).encode(), np.uint8)}
        for number, base in self.bases.items():
            state |= {f"{number}/{name}": values for name, values in base.arrays.items()}
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, NDArray[Any]]) -> AtWork:
        """What `state` returned.

        Raises:
            RunError: It is something else.
        """
        try:
            document = json.loads(state[_LIST].tobytes())
            bases = {
                int(number): Base(
                    server_round=int(number),
                    arrays={name: state[f"{number}/{name}"] for name in told["keys"]},
                    cohort=str(told["cohort"]),
                )
                for number, told in document["bases"].items()
            }
            members = {name: Member(name=name, server_round=began) for name, began in document["members"]}
            if {member.server_round for member in members.values()} != bases.keys():
                raise KeyError(_LIST)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise RunError(
                "the checkpoint does not say who was at work", hint="resume with the version that wrote it"
            ) from e
        return cls(members=members, bases=bases)
