"""One client's share of noise: Skellam or discrete Gaussian integers, from random bits and a table of exact integers.

The size of a value is drawn by inversion of its distribution function, cut at K and rounded down to 2^-127, and its
sign is one bit more. Of 64 random bits one is the sign and 63 are compared with the table; where they tie with an entry
(with a chance below 2^-43) 64 more decide.

**Skellam**, the difference of two Poisson values, has P(k) proportional to the Bessel function I_k(v), v its variance,
and I_{k-1} = I_{k+1} + (2k/v) I_k. The table runs this downwards from I_{K+1} = 0, I_K = 2^160 (Miller), in integers;
as v is a power of two, only bits below the last are lost. **The discrete Gaussian** follows from its first two ratios.

**Distance.** With K chosen so that 2 exp(-K^2 / (2 (v + K/3))) < 2^-125, which bounds P(|x| > K) for both laws:

- The cut moves at most 2^-124.
- Miller's start adds a multiple of (-1)^k K_k(v), the recurrence's other solution, such that k = K + 1 gives zero. As
  K_k grows with k, that moves P(k) by at most P(K+1), and all of them by at most (2K + 1) 2^-125 < 2^-103.
- A last bit lost at k grows no faster than the solution itself, of which it is at most a share 2^-160: altogether
  2 K 2^-160. Of the discrete Gaussian, 384 places leave less than 2^-200 (K^2 roundings, over weights above 2^-128).
- Rounding to 2^-127 moves K entries by less than 2^-127 each: 2^-106.

So a draw is within DISTANCE_PER_DRAW of the exact law.

Source: Abramowitz and Stegun 9.6.26 (recurrence), 9.12 (Miller's algorithm); Canonne, Kamath, Steinke 2020 (tail of the
discrete Gaussian). The tail of Skellam is Bernstein's: its cumulants are those of a Poisson value or zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.privacy.events import SharedNoise
from common.privacy.noise.keystream import SPARE_WORDS, Keystream

DISTANCE_PER_DRAW: Final = 2.0**-100
"""Total variation distance of one drawn value from the exact law."""

SMALLEST_LOG2, LARGEST_LOG2 = 4, 16
"""Standard deviations are 2^4 to 2^16 steps: closely Gaussian already, and tables of a few megabytes still."""

_TAIL_BITS, _START_BITS, _PLACES, _GAUSSIAN_PLACES = 125, 160, 127, 384
_BLOCK: Final = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Table:
    """P(|x| <= k) for k from 0 to K - 1, in units of 2^-127.

    Attributes:
        high: uint64[K]: the first 63 bits.
        low: uint64[K]: the next 64.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]


@lru_cache(maxsize=2)
def table_of(noise: SharedNoise, log2: int) -> Table:
    """The table for a standard deviation of 2^log2 steps; making one takes up to two seconds.

    Raises:
        ValueError: There is no table for it.
    """
    if not SMALLEST_LOG2 <= log2 <= LARGEST_LOG2:
        raise ValueError(f"shares of noise have a standard deviation of 2^4 to 2^16 steps, not 2^{log2}")
    weights = (_skellam if noise == "skellam" else _discrete_gaussian)(log2, _cut(log2))
    weights[1:] = [2 * weight for weight in weights[1:]]
    below = list(accumulate(weights))
    total = below.pop()
    bits = [(value << _PLACES) // total for value in below]
    word = (1 << 64) - 1
    return Table(
        high=np.array([value >> 64 for value in bits], dtype=np.uint64),
        low=np.array([value & word for value in bits], dtype=np.uint64),
    )


def _cut(log2: int) -> int:
    """K."""
    exponent = (_TAIL_BITS + 1) * math.log(2)
    return math.ceil(exponent / 3 + math.sqrt(exponent**2 / 9 + 2 * 4**log2 * exponent))


def _skellam(log2: int, cut: int) -> list[int]:
    """Weights of 0 to `cut`."""
    above, here = 0, 1 << _START_BITS
    weights = [here]
    for k in range(cut, 0, -1):
        above, here = here, above + (2 * k * here >> 2 * log2)
        weights.append(here)
    return weights[::-1]


def _discrete_gaussian(log2: int, cut: int) -> list[int]:
    """Weights of 0 to `cut`, exp(-k^2 / 2 v): each is the one before times a factor, which is itself times q then."""
    one = 1 << _GAUSSIAN_PLACES
    weight, factor, ratio = one, _exponential(2 * log2 + 1), _exponential(2 * log2)
    weights = [weight]
    for _ in range(cut):
        weight, factor = weight * factor >> _GAUSSIAN_PLACES, factor * ratio >> _GAUSSIAN_PLACES
        weights.append(weight)
    return weights


def _exponential(log2: int) -> int:
    """exp(-2^-log2), by its series."""
    total = term = 1 << _GAUSSIAN_PLACES
    order = 1
    while term:
        term //= order << log2
        total += -term if order % 2 else term
        order += 1
    return total


class ShareNoise:
    """Draws shares with the bits of one keystream.

    Guarantee: Values are independent, and each is within DISTANCE_PER_DRAW of the exact law, if the bits are uniform.

    Limits: As `DiscreteGaussian`: not for two threads at a time, and not in constant time.
    """

    def __init__(self, noise: SharedNoise, *, log2: int, stream: Keystream) -> None:
        self._table = table_of(noise, log2)
        self._stream = stream

    def draw(self, count: int) -> NDArray[np.int32]:
        """int32[count] independent values."""
        values = np.empty(count, dtype=np.int32)
        room = np.empty(_BLOCK + SPARE_WORDS, dtype=np.uint64)
        for start in range(0, count, _BLOCK):
            block = values[start : start + _BLOCK]
            self._fill(block, self._stream.fill(room, len(block)))
        return values

    def _fill(self, values: NDArray[np.int32], words: NDArray[np.uint64]) -> None:
        high = self._table.high
        negative = (words & np.uint64(1)).astype(np.bool_)
        words >>= np.uint64(1)
        sizes = np.searchsorted(high, words)
        for tie in np.flatnonzero(high[np.minimum(sizes, len(high) - 1)] == words):
            sizes[tie] += self._more(int(sizes[tie]), words[tie])
        values[:] = sizes
        np.negative(values, out=values, where=negative)

    def _more(self, first: int, word: np.uint64) -> int:
        """How many entries, of those that begin with the same 63 bits, 64 bits more are not below."""
        same = int(np.searchsorted(self._table.high, word, side="right"))
        return int(np.searchsorted(self._table.low[first:same], self._stream.words(1)[0], side="right"))
