"""Clients that are made when somebody asks for them: a population is names, and a function of a client's index."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
import torch

from common.data.collection import Integers
from common.schema import ClientData, Examples, Federation


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Examples in consecutive pieces.

    Attributes:
        examples: All pieces, one after the other.
        offsets: int64[pieces + 1], ascending from 0: piece i is `examples[offsets[i]:offsets[i + 1]]`.
    """

    examples: Examples
    offsets: Integers

    @classmethod
    def taken(cls, examples: Examples, pieces: Sequence[Integers]) -> Self:
        """A copy of the examples at `pieces` (int64[k] each), piece by piece."""
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        order = np.concatenate([np.empty(0, np.int64), *pieces])
        return cls(examples=examples.take(torch.from_numpy(order)), offsets=offsets)

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.offsets) - 1

    def piece(self, index: int) -> Examples:
        """One piece, without copying it."""
        return self.examples.part(int(self.offsets[index]), int(self.offsets[index + 1]))

    def size(self, index: int) -> int:
        """How many examples a piece has."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def drawn(self, pieces: Integers, counts: Integers, rng: np.random.Generator) -> Examples:
        """Examples drawn with replacement: `counts[i]` of the piece `pieces[i]`, which has one if any are wanted."""
        low, high = np.repeat(self.offsets[pieces], counts), np.repeat(self.offsets[pieces + 1], counts)
        return self.examples.take(torch.from_numpy(np.sort(rng.integers(low, high))))


class Population(Sequence[ClientData]):
    """Clients that exist only while somebody holds them.

    Args:
        names: Their names, distinct, in the order of their index.
        make: A client's data from its index, from 0; called whenever somebody asks for it, and equal every time.

    Guarantee: its memory does not grow with the clients that were asked for.
    """

    def __init__(self, names: Sequence[str], make: Callable[[int], ClientData]) -> None:
        self.names = names
        self._make = make

    def client(self, index: int) -> ClientData:
        """The client at an index from 0 to less than their number."""
        return self._make(index)

    def train_size(self, index: int) -> int:
        """How many training examples a client has; subclasses know it without making them."""
        return len(self._make(index).train)

    @overload
    def __getitem__(self, index: int) -> ClientData: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ClientData]: ...
    def __getitem__(self, index: int | slice) -> ClientData | Sequence[ClientData]:
        """See `Sequence`; a slice holds all of its clients."""
        places = range(len(self))
        if isinstance(index, slice):
            return tuple(map(self.client, places[index]))
        return self.client(places[index])

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.names)


class StoredPopulation(Population):
    """A population whose examples are all in memory, once; a client's are found by its index.

    Two arrays of examples and two of offsets are all that is large about it, so that processes can share them: another
    process goes on with the same population `over` tensors that it has mapped.

    Attributes:
        train: What clients train on.
        test: What is held out for them.
    """

    train: Rows
    test: Rows

    @abstractmethod
    def over(self, train: Rows, test: Rows) -> Self:
        """The same population, its examples in other places of memory."""


class DividedPopulation(StoredPopulation):
    """Client i holds piece i of each: every example belongs to one client, and none is copied to make it."""

    def __init__(self, names: Sequence[str], train: Rows, test: Rows) -> None:
        super().__init__(names, self._piece)
        self.train, self.test = train, test

    def over(self, train: Rows, test: Rows) -> Self:
        """See `StoredPopulation`."""
        return type(self)(self.names, train, test)

    def train_size(self, index: int) -> int:
        """See `Population`."""
        return self.train.size(index)

    def _piece(self, index: int) -> ClientData:
        return ClientData(name=self.names[index], train=self.train.piece(index), test=self.test.piece(index))


def train_size(federation: Federation, index: int) -> int:
    """How many training examples the client at an index has, without making them where that can be told."""
    clients = federation.clients
    return clients.train_size(index) if isinstance(clients, Population) else len(clients[index].train)
