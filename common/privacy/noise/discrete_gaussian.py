"""The discrete Gaussian over the integers, drawn from random bits with integer arithmetic only.

D(s) below is the discrete Gaussian with parameter s: the integer x has a probability proportional to exp(-x^2 / 2s^2).
Integers come in cells of WIDTH, x = WIDTH * cell + offset; `nearest` is the one of a cell that is nearest to zero.

1. A cell is drawn from a table with a probability proportional to exp(-nearest^2 / 2 GRID_STDDEV^2).
2. The offset is drawn uniformly: random bits.
3. x is kept with probability exp(-m / 2 GRID_STDDEV^2), where m = x^2 - nearest^2, and otherwise drawn anew. As
   2 GRID_STDDEV^2 is a power of two, von Neumann's trial decides that without computing an exponential: count trials
   of probability m / (2 GRID_STDDEV^2 * k), k = 1, 2, ..., until the first that fails, and keep x if k is odd.

The first trial hardly ever succeeds. So the table splits each cell into a small part, a share 2^-b no smaller than the
largest m / 2 GRID_STDDEV^2 of the cell, and the rest. In the rest the trial has failed; in the small part it succeeds
with probability 2^b m / 2 GRID_STDDEV^2. Nearly always 16 bits choose an entry of a guide that is wholly rest.

**Distance.** Steps 2 and 3 are exact, so only the table errs. It is the distribution function of step 1, cut at CELLS
cells on either side (the mass beyond is below 2^-187, and costs as much) and rounded down to 2^-192; that puts each of
the 2 CELLS probabilities off by at most 2^-192, which costs CELLS * 2^-192 = 2^-180 together. Random bits are compared
with it until they decide, up to 208 (inversion); the split of a cell is exact at 2^-208. The table's computation, in
integers, errs by less than 2^-270. As x is kept with probability p > 0.9, its law's distance is at most 2 / p times
the proposal's: below 2^-178 in all.

**Continuous noise.** Let a continuous Gaussian of variance GRID_STDDEV^2 - r^2 around an integer be rounded at random,
to y with a probability proportional to exp(-(y - x)^2 / 2 r^2). By Poisson summation, y's law is within e / (1 - e) of
D(GRID_STDDEV) around that integer, with e = 2.01 exp(-2 pi^2 r^2): for r = 2.7 below 2^-206. So every guarantee of the
continuous Gaussian mechanism, subsampled or not, is one of this noise (which post-processes it), up to
DISTANCE_PER_DRAW a coordinate.

Source: von Neumann 1951, "Various techniques used in connection with random digits"; Karney 2016, "Sampling exactly
from the normal distribution"; Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy" (the
trial, and the law); Peikert 2010, "An efficient and parallel Gaussian sampler for lattices", theorem 3.1 (rounding).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from common.privacy.noise.keystream import SPARE_WORDS, Keystream

GUIDE_BITS = 16  # 2^16 entries of four bytes stay in a second-level cache
OFFSET_BITS = 12
WIDTH = 1 << OFFSET_BITS

GRID_STDDEV = 256 * WIDTH
"""Parameter of the discrete Gaussian, in steps of the grid: 2^20. Its standard deviation, up to a relative 2^-100."""

DISTANCE_PER_DRAW = 2.0**-177
"""Total variation distance of one drawn value from D(GRID_STDDEV), and also from a rounded continuous Gaussian of
standard deviation GAUSSIAN_STDDEV. A plan adds (1 + e^epsilon) * draws * DISTANCE_PER_DRAW to its delta."""

GAUSSIAN_STDDEV = GRID_STDDEV * (1 - 2.0**-36)
"""Standard deviation, in steps, of the continuous Gaussian whose guarantees hold: below sqrt(GRID_STDDEV^2 - 2.7^2)."""

CELLS = 4096  # on either side of zero: 16 standard deviations
BOUNDARY_BITS = GUIDE_BITS + 64 + 128
_LARGEST_SPLIT = 16
_DENOMINATOR_BITS = (2 * GRID_STDDEV**2).bit_length() - 1
_CODE = -(1 << 30)
_BLOCK = 1 << 17  # values at a time


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables:
    """Step 1 by inversion. Parts number all cells' parts from the lowest: 2 * (cell + CELLS), plus 1 for the rest.

    Attributes:
        guide: int32[2^16]: WIDTH times the cell where an entry lies wholly in its rest; elsewhere _CODE - rank.
        below: int64[ranks]: part below the entry's first boundary.
        cuts: uint64[2, ranks]: of the entry's first and second boundary, the 64 bits after the entry's own 16; all ones
            where there is none.
        crowded: Ranks from here on have more than two boundaries.
        tops: uint64[4 CELLS - 1]: the first 64 bits of every boundary.
        boundaries: Upper boundaries of all parts but the last, in units of 2^-208.
        nearest: int64[2 CELLS].
        shift: uint64[2 CELLS]: how far to shift a random word for the first trial in the small part.
    """

    guide: torch.Tensor
    below: NDArray[np.int64]
    cuts: NDArray[np.uint64]
    crowded: int
    tops: NDArray[np.uint64]
    boundaries: list[int]
    nearest: NDArray[np.int64]
    shift: NDArray[np.uint64]


def distribution_function() -> list[int]:
    """Step 1: the probability of all cells below each from -CELLS to CELLS, down to a multiple of 2^-192.

    Returns:
        2 CELLS + 1 integers in units of 2^-208, from 0 to 2^208.

    In integers with 320 binary places. Of cell i >= 0 the nearest value is i * WIDTH; of cell -1 - i it is
    -(i * WIDTH + 1). Each weight follows from its predecessor by a factor, each factor by a constant one; errors of
    2^-320 in fewer than 2^26 products leave less than 2^-270.
    """
    one = 1 << 320
    upper, upper_factor = one, _exponential(WIDTH**2, one)
    lower, lower_factor = _exponential(1, one), _exponential(WIDTH**2 + 2 * WIDTH, one)
    ratio = _exponential(2 * WIDTH**2, one)
    uppers, lowers = [], []
    for _ in range(CELLS):
        uppers.append(upper)
        lowers.append(lower)
        upper, upper_factor = upper * upper_factor // one, upper_factor * ratio // one
        lower, lower_factor = lower * lower_factor // one, lower_factor * ratio // one
    total, below, result = sum(uppers) + sum(lowers), 0, [0]
    for weight in lowers[::-1] + uppers:
        below += weight
        result.append((below << BOUNDARY_BITS - _LARGEST_SPLIT) // total << _LARGEST_SPLIT)
    return result


def _exponential(squares: int, one: int) -> int:
    """exp(-squares / 2 GRID_STDDEV^2) * one, by its series."""
    total, term, order = one, one, 1
    while term:
        term = term * squares // (order << _DENOMINATOR_BITS)
        total += -term if order % 2 else term
        order += 1
    return total


def _splits() -> tuple[list[int], list[int]]:
    """Of each cell: `nearest`, and the b of its small part's share 2^-b."""
    nearests, splits = [], []
    for cell in range(-CELLS, CELLS):
        ends = WIDTH * cell, WIDTH * cell + WIDTH - 1
        nearest, farthest = sorted(ends, key=abs)
        nearests.append(nearest)
        most = farthest**2 - nearest**2
        splits.append(min(_LARGEST_SPLIT, _DENOMINATOR_BITS - (most - 1).bit_length()))
    return nearests, splits


@cache
def tables() -> Tables:
    """The tables, made once a process."""
    starts = distribution_function()
    nearest, splits = _splits()
    boundaries = []
    for start, end, split in zip(starts[:-1], starts[1:], splits, strict=True):
        boundaries += [start + (end - start >> split), end]
    boundaries.pop()
    entry_of = np.array([boundary >> (BOUNDARY_BITS - GUIDE_BITS) for boundary in boundaries])
    entries = np.arange(1 << GUIDE_BITS)
    part = np.searchsorted(entry_of, entries)
    inside = np.searchsorted(entry_of, entries, side="right") - part
    coded = np.concatenate(
        (np.flatnonzero((inside <= 2) & ((inside > 0) | (part % 2 == 0))), np.flatnonzero(inside > 2))
    )
    guide = ((part >> 1) - CELLS << OFFSET_BITS).astype(np.int32)
    guide[coded] = _CODE - np.arange(len(coded))
    word = (1 << 64) - 1
    cuts = [
        [boundaries[part[entry] + which] >> 128 & word if which < inside[entry] else word for entry in coded]
        for which in range(2)
    ]
    return Tables(
        guide=torch.from_numpy(guide),
        below=part[coded],
        cuts=np.array(cuts, dtype=np.uint64),
        crowded=int((inside[coded] <= 2).sum()),
        tops=np.array([boundary >> (BOUNDARY_BITS - 64) for boundary in boundaries], dtype=np.uint64),
        boundaries=boundaries,
        nearest=np.array(nearest),
        shift=np.array([64 - _DENOMINATOR_BITS + split for split in splits], dtype=np.uint64),
    )


class DiscreteGaussian:
    """Draws from D(GRID_STDDEV) with the bits of one keystream.

    Guarantee: Values are independent, and each is within DISTANCE_PER_DRAW of the exact law, if the bits are uniform.

    Limits: Not for two threads at a time. How long a draw takes depends on how many bits the comparisons needed, and so
    a little on all values together; nothing is held to a constant time.
    """

    def __init__(self, stream: Keystream) -> None:
        self._stream = stream
        self._tables = tables()
        self._room = np.empty(_BLOCK // 2 + SPARE_WORDS, dtype=np.uint64)
        self._entries = np.empty(_BLOCK, dtype=np.uint32)

    def draw(self, count: int) -> NDArray[np.int32]:
        """int32[count] independent values of D(GRID_STDDEV), at most CELLS * WIDTH in size.

        Some more are proposed, to take the places of those that are refused (one of 640).
        """
        total = count + (count >> 8) + 8 if count else 0
        values = np.empty(total, dtype=np.int32)
        starts = range(0, total, _BLOCK)
        refused = [start + self._propose(values[start : start + _BLOCK]) for start in starts]
        gaps = np.concatenate([np.empty(0, dtype=np.intp), *refused])
        kept = np.ones(total - count, dtype=np.bool_)
        kept[gaps[gaps >= count] - count] = False
        gaps = gaps[gaps < count]
        fill = values[count:][kept][: len(gaps)]
        if len(fill) < len(gaps):
            fill = np.concatenate((fill, self.draw(len(gaps) - len(fill))))
        values[gaps] = fill
        return values[:count]

    def _propose(self, values: NDArray[np.int32]) -> NDArray[np.intp]:
        """Fill `values` from half a word each, and say which of them are refused."""
        count = len(values)
        words = self._stream.fill(self._room, (count + 1) // 2).view(np.uint32)[:count]
        entries = self._entries[:count]
        np.right_shift(words, 32 - GUIDE_BITS, out=entries)
        # numpy's take would need the entries as int64: half as fast again
        torch.index_select(
            self._tables.guide, 0, torch.from_numpy(entries.view(np.int32)), out=torch.from_numpy(values)
        )
        tried, cells = self._settle(entries, values)
        np.bitwise_and(words, WIDTH - 1, out=words)
        np.bitwise_or(values, words.view(np.int32), out=values)
        return tried[self._refuses(values[tried], cells)]

    def _settle(
        self, entries: NDArray[np.uint32], values: NDArray[np.int32]
    ) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Replace codes by cells; 64 bits more almost always decide. Returns where a trial is due, and those cells."""
        table = self._tables
        at = np.flatnonzero(values <= _CODE)
        rank = np.subtract(_CODE, values[at], dtype=np.intp)
        bits = self._stream.words(len(at))
        first, second = table.cuts[0][rank], table.cuts[1][rank]
        part = table.below[rank] + (bits >= first) + (bits >= second)
        longer = np.flatnonzero((rank >= table.crowded) | (bits == first) | (bits == second))
        part[longer] = self._search(entries[at[longer]], bits[longer])
        cells = part >> 1
        values[at] = cells - CELLS << OFFSET_BITS
        due = np.flatnonzero(part & 1 == 0)
        return at[due], cells[due]

    def _search(self, entries: NDArray[np.uint32], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Parts for the 16 + 64 bits drawn so far; 128 more where they tie with a boundary in the first 64."""
        table = self._tables
        tops = entries.astype(np.uint64) << np.uint64(64 - GUIDE_BITS) | bits >> np.uint64(GUIDE_BITS)
        part = np.searchsorted(table.tops, tops, side="right")
        for tie in np.flatnonzero(table.tops[part - 1] == tops):
            high, low = self._stream.words(2).tolist()
            drawn = (int(entries[tie]) << 64 | int(bits[tie])) << 128 | high << 64 | low
            part[tie] = bisect_right(table.boundaries, drawn)
        return part

    def _refuses(self, values: NDArray[np.int32], cells: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Step 3 in the cells' small parts: for which values the trial ends on an even k."""
        nearest = self._tables.nearest[cells]
        excess = ((values - nearest) * (values + nearest)).astype(np.uint64)
        refused = self._stream.words(len(values)) >> self._tables.shift[cells] < excess
        succeeded = np.flatnonzero(refused)
        second = self._stream.words(len(succeeded)) >> np.uint64(63 - _DENOMINATOR_BITS)
        for at in succeeded[second < excess[succeeded]]:
            refused[at] = self._ends_on_even(int(excess[at]))
        return refused

    def _ends_on_even(self, excess: int) -> bool:
        """The trial from k = 3 on, after two successes."""
        k = 3
        while self._uniform_below(k << _DENOMINATOR_BITS) < excess:
            k += 1
        return k % 2 == 0

    def _uniform_below(self, bound: int) -> int:
        """An unbiased integer from 0 to bound - 1, for a bound below 2^63."""
        while True:
            word = int(self._stream.words(1)[0])
            if word < (1 << 64) // bound * bound:
                return word % bound
