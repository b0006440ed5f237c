"""What events come to, before any accounting: equal steps together, for one unit and one neighbouring relation.

How events are read:

* an `example` event for `example`, a `client` event for `client`: a Poisson-sampled Gaussian, at the event's rate;
* a `client` event for `example`: one example changes one client's update, which stays in its ball. So the sum moves by
  up to twice the sensitivity, and the count by one instead of a half; no amplification is claimed;
* an `example` event for `client`: infinite, since it hides one example, not all of a client's;
* `MatrixGaussian`: one Gaussian for the whole run, however many participations are recorded;
* `DistributedNoise`: a sum with the noise of its fewest honest sites. Its neighbours differ by an update that is zero
  instead; an update that becomes another one moves it twice as far, and so does one example;
* `NonPrivate`: infinite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple, Self

from common.errors import PrivacyError
from common.privacy.accounting.renyi import check_range, incomputable
from common.privacy.events import (
    DistributedNoise,
    MatrixGaussian,
    NonPrivate,
    PrivacyEvent,
    SampledGaussian,
    SharedNoise,
    Unit,
)

Relation = Literal["add/remove", "replace-one"]

Segment = tuple[float, float, int]
"""Noise multiplier, sampling rate, number of steps."""


class NoisedSum(NamedTuple):
    """A sum with shares of discrete noise, as far as it costs anything; sensitivities are those of the relation."""

    mechanism: SharedNoise
    variance: int
    shares: int
    l2_squared: int
    l1: int
    dimensions: int


class Tally:
    """A running total of events.

    Attributes:
        unit: For whom events are read.
        relation: Which data sets are neighbours.
        infinite: Whether something is not covered by any noise.

    Guarantee: The order of events leaves no trace, nor how steps of equal noise and rate are divided among them.
    """

    def __init__(
        self, events: Iterable[PrivacyEvent] = (), *, unit: Unit = "example", relation: Relation = "add/remove"
    ) -> None:
        self.unit = unit
        self.relation = relation
        self.infinite = False
        self._steps: Counter[tuple[float, float]] = Counter()
        self._sums: Counter[NoisedSum] = Counter()
        self._distances: Counter[float] = Counter()
        self._covered: set[MatrixGaussian] = set()
        for event in events:
            self.add(event)

    def plus(self, event: PrivacyEvent, copies: int = 1) -> Self:
        """Another total with `copies` of an event more; this one stays as it is.

        Raises:
            PrivacyError: The event is unknown, impossible, or cannot be computed with.
        """
        other = type(self)(unit=self.unit, relation=self.relation)
        other.infinite = self.infinite
        other._steps, other._distances = self._steps.copy(), self._distances.copy()  # noqa: SLF001 - its own class
        other._sums, other._covered = self._sums.copy(), self._covered.copy()  # noqa: SLF001
        other.add(event, copies)
        return other

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Equal steps together, sorted. Noise is over the sensitivity to one unit that comes or goes; where the
        relation is replace-one, neighbours are twice as far apart.
        """
        return tuple(sorted((noise, rate, count) for (noise, rate), count in self._steps.items()))

    @property
    def sums(self) -> tuple[tuple[NoisedSum, int], ...]:
        """Equal sums with distributed noise together, sorted, and how many there are of each."""
        return tuple(sorted(self._sums.items()))

    @property
    def empty(self) -> bool:
        """Whether nothing was released."""
        return not (self.infinite or self._steps or self._sums)

    @property
    def distance(self) -> float:
        """Total variation distance of all noise from what is counted."""
        return math.fsum(distance * count for distance, count in self._distances.items())

    def add(self, event: PrivacyEvent, copies: int = 1) -> None:
        """Count `copies` of an event more; an error leaves the total as it was. Raises as `plus`."""
        if type(event) not in {SampledGaussian, MatrixGaussian, DistributedNoise, NonPrivate}:
            raise PrivacyError(
                f"a privacy event of unknown kind ({type(event).__name__}) cannot be counted", hint="update Coterie"
            )
        event.check()
        if isinstance(event, MatrixGaussian):
            whole = replace(event, server_round=1)
            if whole in self._covered:
                return
            self._covered.add(whole)
            copies = 1
        if isinstance(event, NonPrivate) or (event.unit == "example" and self.unit == "client"):
            self.infinite = True
            return
        if isinstance(event, DistributedNoise):
            self._sums[self._read(event)] += event.steps * copies
            self._distances[event.distance] += copies
            return
        try:
            noise = event.noise_multiplier
        except ArithmeticError as e:  # squares near the ends of float64
            raise incomputable() from e
        rate, steps = (event.sampling_rate, event.steps) if isinstance(event, SampledGaussian) else (1.0, 1)
        if event.unit == "client" and self.unit == "example":
            rate = 1.0
            noise = noise if self.relation == "replace-one" else noise / 2  # one ball, whatever became of the example
        check_range(noise, rate)
        self._steps[noise, rate] += steps * copies
        self._distances[event.distance] += copies

    def _read(self, event: DistributedNoise) -> NoisedSum:
        twice = 2 if self.relation == "replace-one" or self.unit == "example" else 1
        return NoisedSum(
            mechanism=event.mechanism,
            variance=event.variance,
            shares=event.shares,
            l2_squared=twice * twice * event.l2_squared,
            l1=twice * event.l1,
            dimensions=event.dimensions,
        )
