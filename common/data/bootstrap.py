"""A population without an end: each client draws its own examples, with replacement, from those of a data set.

Rows are copied: clients share examples, and a client can hold one several times. What a simulation of such a population
says of privacy counts each copy by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from common.config.settings import DataSettings
from common.data.collection import Collection, Integers, Mask
from common.data.partition import bounded_alpha
from common.data.population import Rows, StoredPopulation
from common.errors import DataError
from common.names import NumberedNames
from common.schema import ClientData, Examples

_STREAM = 4
"""Where clients draw from among the streams of a data seed; `federation` has those before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How many training examples clients have: spread evenly on a logarithmic scale.

    Attributes:
        mean: The mean, 1 or more.
        ratio: Largest over smallest, 1 or more.
        most: No client has more; 0 sets no limit.
    """

    mean: float
    ratio: float
    most: int = 0

    def at(self, place: float) -> int:
        """The number at a place (in [0, 1)) of the scale; at least 1."""
        spread = math.log(self.ratio)
        # The mean of ratio^u over u in [0, 1) is (ratio - 1) / log(ratio).
        smallest = self.mean * spread / (self.ratio - 1) if spread > 1e-6 else self.mean
        size = max(1, round(smallest * math.exp(spread * place)))
        return min(size, self.most) if self.most else size


class BootstrapPopulation(StoredPopulation):
    """Client i's examples follow from the seed and i alone, whoever else there is.

    Each client belongs to one group: that of a training example drawn at random, so that groups have clients in
    proportion to their examples. It draws from the group's training examples; and from the group's held-out ones, in
    the proportion that the group has of both, at least one where there is one. Where pieces are classes instead of
    groups, each client draws class shares from Dirichlet(alpha), and its examples by them.

    Args:
        names: The clients' names.
        train: Training examples, by group or by class; one or more.
        test: Held-out examples, by the same.
        sizes: How many examples clients have.
        seed: Decides everything.
        alpha: Concentration of the class shares; None where pieces are groups.

    Guarantee: no client is without training examples.
    """

    def __init__(
        self, names: Sequence[str], train: Rows, test: Rows, *, sizes: Sizes, seed: int, alpha: float | None
    ) -> None:
        super().__init__(names, self._drawn)
        self.train, self.test = train, test
        self._sizes, self._seed, self._alpha = sizes, seed, alpha

    def over(self, train: Rows, test: Rows) -> Self:
        """See `StoredPopulation`."""
        return type(self)(self.names, train, test, sizes=self._sizes, seed=self._seed, alpha=self._alpha)

    def train_size(self, index: int) -> int:
        """See `Population`."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[np.random.Generator, int]:
        """A client's own generator after its first draw, and how many training examples that gives it."""
        # Simulated partitions are public: nothing secret rests on this generator.
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(_STREAM, index)))
        return rng, self._sizes.at(rng.random())

    def _drawn(self, index: int) -> ClientData:
        """One client: its size, its group or class shares, its training examples, and last its held-out ones."""
        rng, count = self._draw(index)
        if self._alpha is None:
            row = int(rng.integers(len(self.train.examples)))
            group = int(np.searchsorted(self.train.offsets, row, side="right")) - 1
            ratio = self.test.size(group) / self.train.size(group)
            train = self.train.drawn(np.array([group]), np.array([count]), rng)
            test = self.test.drawn(np.array([group]), np.array([_held(count, ratio)]), rng)
        else:
            shares = rng.dirichlet(np.full(len(self.train), bounded_alpha(self._alpha)))
            ratio = len(self.test.examples) / len(self.train.examples)
            train = _by_shares(self.train, shares, count, rng)
            test = _by_shares(self.test, shares, _held(count, ratio), rng)
        return ClientData(name=self.names[index], train=train, test=test)


def bootstrap(collection: Collection, settings: DataSettings, held: Mask, *, seed: int) -> BootstrapPopulation:
    """The population of `data.partition = 'bootstrap'`.

    Groups are the data's own; data of one group or none is drawn by class, and running text from all of it.

    Args:
        collection: All examples.
        settings: Number and size of the clients, and alpha.
        held: bool[n], the examples that are held out.
        seed: Decides everything.

    Raises:
        DataError: There is nothing to train on.
    """
    if held.all():
        raise DataError(f"{settings.name}: there are no examples to draw from", hint="lower data.test_fraction")
    alpha = None
    if collection.group_of is not None and len(collection.groups) > 1:
        pieces, piece_of = len(collection.groups), collection.group_of
    elif collection.schema.per_position:
        pieces, piece_of = 1, np.zeros(len(held), np.int64)
    else:
        pieces, piece_of = collection.schema.num_classes, collection.examples.targets.numpy()
        alpha = settings.alpha
    return BootstrapPopulation(
        NumberedNames(settings.clients),
        _sorted(collection.examples, piece_of, pieces, ~held),
        _sorted(collection.examples, piece_of, pieces, held),
        sizes=Sizes(mean=settings.client_examples, ratio=settings.size_ratio, most=settings.max_examples),
        seed=seed,
        alpha=alpha,
    )


def _sorted(examples: Examples, piece_of: Integers, pieces: int, chosen: Mask) -> Rows:
    """A copy of the chosen examples, piece by piece."""
    places = np.flatnonzero(chosen)
    order = places[np.argsort(piece_of[places], kind="stable")]
    offsets = np.cumsum([0, *np.bincount(piece_of[places], minlength=pieces)], dtype=np.int64)
    return Rows(examples=examples.take(torch.from_numpy(order)), offsets=offsets)


def _held(count: int, ratio: float) -> int:
    """How many held-out examples go with so many training examples."""
    return max(1, round(count * ratio)) if ratio else 0


def _by_shares(rows: Rows, shares: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> Examples:
    """Examples drawn by the shares of those pieces that have any; where these have none, from all that there are."""
    there = np.diff(rows.offsets)
    wanted = np.where(there > 0, shares, 0.0)
    if wanted.sum() <= 0:
        wanted = there.astype(np.float64)
    if not wanted.sum():
        return rows.examples.part(0, 0)
    return rows.drawn(np.arange(len(rows)), rng.multinomial(count, wanted / wanted.sum()), rng)
