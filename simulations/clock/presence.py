"""When a device is there: spells of virtual time, found for any moment without looking at those before it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from simulations.clock.draws import uniforms

Spell = tuple[float, float]
"""From a moment to another, the second one excluded; virtual seconds."""


_ROUNDING: Final = 2.0**-48
"""Relative error of a moment's place among the cycles, at most."""


class Presence(Protocol):
    """When a device is there.

    Guarantee: `ends(begins(at))` is a moment after `begins(at)`, and `begins(at)` is not before `at`.
    """

    def ends(self, at: float) -> float | None:
        """When the device goes away that is there `at` this moment; None where it is not, infinity where it stays."""

    def begins(self, at: float) -> float:
        """The first moment from `at` on at which the device is there."""


@dataclass(frozen=True, slots=True)
class Always:
    """Never away."""

    def ends(self, at: float) -> float | None:  # noqa: ARG002 - see `Presence`
        """Never."""
        return math.inf

    def begins(self, at: float) -> float:
        """Now."""
        return at


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One spell in each cycle of fixed length, of random length and place in it, from a seed.

    The cycles of different devices begin at different moments. So at any moment a device is there with probability
    `share`, independently of all others, and a spell lasts `mean_seconds` on average: its length is uniform between 0
    and twice the mean, or, where that is longer than a cycle, between a cycle and what is left of twice the mean.

    Attributes:
        seed, name: Whose spells.
        share: Share of the time that the device is there, more than 0 and less than 1.
        mean_seconds: Mean length of a spell.
    """

    seed: int
    name: str
    share: float
    mean_seconds: float

    def ends(self, at: float) -> float | None:
        """See `Presence`."""
        length, phase = self._cycles()
        cycles = (at + phase) / length
        error = _ROUNDING * (1 + abs(cycles))
        for cycle in range(math.floor(cycles - error), math.floor(cycles + error) + 1):  # mostly this one alone
            begin, end = self._spell(cycle, length, phase)
            if begin <= at < end:
                return end
        return None

    def begins(self, at: float) -> float:
        """See `Presence`."""
        if self.ends(at) is not None:
            return at
        length, phase = self._cycles()
        cycle = math.floor((at + phase) / length) - 1
        while True:
            begin, end = self._spell(cycle, length, phase)
            if begin >= at and end > begin:
                return begin
            cycle += 1

    def _cycles(self) -> tuple[float, float]:
        """Length of a cycle, and how much of the first one is over at the start."""
        length = self.mean_seconds / self.share
        return length, length * uniforms(self.seed, "phase", self.name)[0]

    def _spell(self, cycle: int, length: float, phase: float) -> Spell:
        long, place = uniforms(self.seed, "spell", self.name, cycle)
        least, most = max(0.0, 2 * self.share - 1), min(1.0, 2 * self.share)
        part = least + (most - least) * long
        begin = (cycle + (1 - part) * place) * length - phase
        return begin, begin + part * length


class Recorded:
    """Spells that repeat, as a trace says.

    Args:
        spells: Within one period: ascending, apart from each other, at least one, none empty. One that ends with the
            period and one that begins with it are one spell.
        period: Seconds after which they repeat; the first period begins with the run.
    """

    __slots__ = ("_begins", "_period", "_spells")

    def __init__(self, spells: tuple[Spell, ...], *, period: float) -> None:
        self._spells, self._period = spells, period
        self._begins = [begin for begin, _ in spells]

    def ends(self, at: float) -> float | None:
        """See `Presence`."""
        for cycle, place in self._near(at):
            begin, end = self._spell(cycle, place)
            if begin <= at < end:
                return self._through(cycle, place, end)
        return None

    def begins(self, at: float) -> float:
        """See `Presence`."""
        if self.ends(at) is not None:
            return at
        return min(begin for begin, _ in (self._spell(*near) for near in self._near(at)) if begin >= at)

    def _near(self, at: float) -> Iterator[tuple[int, int]]:
        """Cycle and place of the spells around a moment, wherever rounding errors put it."""
        cycle = math.floor(at / self._period)
        place = bisect_right(self._begins, at - cycle * self._period) - 1
        for near in range(place - 1, place + 3):
            beyond, within = divmod(near, len(self._spells))
            yield cycle + beyond, within

    def _spell(self, cycle: int, place: int) -> Spell:
        begin, end = self._spells[place]
        return cycle * self._period + begin, cycle * self._period + end

    def _through(self, cycle: int, place: int, end: float) -> float:
        """The end of a spell, or of the next period's first where the two touch."""
        touches = place == len(self._spells) - 1 and self._spells[-1][1] == self._period and self._begins[0] == 0
        if not touches:
            return end
        return math.inf if len(self._spells) == 1 else self._spell(cycle + 1, 0)[1]
