"""DP-FTRL by matrix factorisation: noise that is correlated over rounds, so that much of it cancels in running sums.

Let x_1, ..., x_n be what the rounds of a run sum up, and let C be a lower-triangular Toeplitz matrix with first column
c_0, c_1, .... Instead of x_t with fresh noise, x_hat = C^-1 (C x + z) is released, with independent z. Training uses
prefix sums of x_hat, and what x_1 + ... + x_t has in noise is a row of A C^-1 z, A being the matrix of ones on and
below its diagonal. C = A^(1/2) spreads the noise well: c_k = binom(2k, k) / 4^k.

**Sensitivity.** A unit's contributions to the rounds are vectors u_t of norm at most 1, zero in rounds in which it does
not take part. Let `pattern` be the rounds in which it does, at most `participations` of them, any two of them at least
`min_separation` = b apart; let C_t be column t of C. If no coefficient is negative, then

    |C u|^2 = sum over s, t in pattern of <C_s, C_t> <u_s, u_t>  <=  sum over s, t in pattern of <C_s, C_t>,

with equality for equal unit vectors u_t. For s <= t, <C_s, C_t> = sum_{j=0}^{n-t} c_j c_{j+t-s}. If coefficients never
increase either, this does not increase as t - s grows, nor as t grows with t - s kept. The i-th participation is not
before round 1 + (i-1) b, and the i-th and j-th are at least (j-i) b apart. So, term by term, no pattern gives more than
rounds 1, 1 + b, 1 + 2b, ..., and a participation more never gives less. The sensitivity is therefore exactly
|C_1 + C_{1+b} + ... |, with as many columns as are allowed and fit. Nothing is assumed about how many coefficients are
zero; where at most b are not, columns do not overlap, and it is at most sqrt(participations) |C_1|.

The x_t may depend on earlier releases: given these, (C u)_t is all that neighbours differ by in round t, and the bound
holds for every course that the run can take.

Source: Kairouz et al. 2021 (arXiv 2103.00039), DP-FTRL; Denisov et al. 2022 (arXiv 2202.08312), factorisation and
adaptivity; Fichtenberger, Henzinger and Upadhyay 2023 (arXiv 2202.11205), the square root; Choquette-Choo et al. 2023
(arXiv 2306.08153), bands and separation; Kalinin and Lampert 2024 (arXiv 2405.13763), the banded square root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError

_ROUNDED_UP = 1 + 2.0**-30
"""More than rounding in float64 can take from a sum of 2^20 positive terms."""


def coefficients(*, rounds: int, bands: int) -> tuple[float, ...]:
    """First column of the square root of the prefix sums, cut off after `bands` entries.

    Args:
        rounds: Rounds of the run, 1 or more.
        bands: Most entries that are not zero, 1 or more: a round's noise depends on that of `bands - 1` rounds before,
            and as many past sums have to be kept. 1 gives independent noise.

    Guarantee: The first is 1, all are positive, none is larger than the one before: what `sensitivity` needs.

    Raises:
        PrivacyError: There is no round or no band.
    """
    if rounds < 1 or bands < 1:
        raise PrivacyError(f"{bands} bands over {rounds} rounds", hint="both must be 1 or more")
    column = [1.0]
    for k in range(1, min(rounds, bands)):
        column.append(column[-1] * (2 * k - 1) / (2 * k))
    return tuple(column)


@lru_cache(maxsize=256)
def sensitivity(coefficients: tuple[float, ...], rounds: int, participations: int, min_separation: int) -> float:
    """L2 norm of what one unit can change C x by, where it changes each x_t by a vector of norm at most 1.

    Args:
        coefficients: First column of C; further entries are zero.
        rounds: Rounds of the run.
        participations: Most rounds in which a unit takes part.
        min_separation: Fewest rounds from one participation to the next; 1 where they can follow one another.

    Guarantee: No participation that the arguments allow gives more (see the module); rounded up by a relative 2^-30,
        it is met by a unit that takes part as early and as often as it may.

    Raises:
        PrivacyError: A coefficient is negative or larger than the one before, or an argument is below 1.
    """
    _check(coefficients)
    if min(rounds, participations, min_separation) < 1:
        raise PrivacyError("a unit takes part at least once", hint="rounds, participations and separation are from 1")
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    total = np.zeros(rounds)
    for start in range(0, rounds, min_separation)[:participations]:
        total[start:] += column[: rounds - start]
    return math.sqrt(float(total @ total)) * _ROUNDED_UP


def prefix_error(coefficients: Sequence[float], rounds: int) -> float:
    """Root mean square over rounds 1 to `rounds` of the noise in x_hat_1 + ... + x_hat_t, for z of deviation 1.

    Times `sensitivity` this is what a factorisation is judged by: independent noise, (1.0,), gives
    sqrt((rounds + 1) / 2) times the root of the participations.
    """
    column = np.asarray(coefficients, np.float64)
    inverse = np.zeros(rounds)
    inverse[0] = 1 / column[0]
    for t in range(1, rounds):
        reach = min(t, len(column) - 1)
        inverse[t] = -(column[1 : reach + 1] @ inverse[t - reach : t][::-1]) / column[0]
    return math.sqrt(float(np.mean(np.cumsum(np.cumsum(inverse) ** 2))))


@lru_cache(maxsize=64)
def choose_bands(*, rounds: int, participations: int, min_separation: int, most: int = 64) -> int:
    """The number of bands with which prefix sums have the least noise at equal privacy.

    Where every unit may take part in every round, that is 1: the changes that it makes add up in C x as they do in the
    sums themselves, and independent noise is better than the square root. It is worth its memory from a
    `min_separation` of 2 on.

    Args:
        rounds: As for `sensitivity`.
        participations: As for `sensitivity`.
        min_separation: As for `sensitivity`.
        most: Bands that there is memory for: `2 * (bands - 1)` times the model is kept, in float64.
    """

    def noise(bands: int) -> float:
        column = coefficients(rounds=rounds, bands=bands)
        return sensitivity(column, rounds, participations, min_separation) * prefix_error(column, rounds)

    most = min(most, rounds)
    tried = {1, min(min_separation, most), most} | {2**k for k in range(most.bit_length()) if 2**k <= most}
    return min(sorted(tried), key=noise)


def encode(
    coefficients: Sequence[float], value: NDArray[np.float64], past: Sequence[NDArray[Any]]
) -> NDArray[np.float64]:
    """Row t of C x: c_0 x_t + c_1 x_{t-1} + ....

    Args:
        coefficients: First column of C.
        value: float64[d]: x_t.
        past: x_{t-1} last, each float64[d]; those before round 1 and beyond the bands are left out.
    """
    result: NDArray[np.float64] = coefficients[0] * value + _history(coefficients, past, value.shape)
    return result


def decode(
    coefficients: Sequence[float], encoded: NDArray[np.float64], past: Sequence[NDArray[Any]]
) -> NDArray[np.float64]:
    """x_hat_t from row t of C x_hat and the x_hat before it: the inverse of `encode`, by forward substitution."""
    result: NDArray[np.float64] = (encoded - _history(coefficients, past, encoded.shape)) / coefficients[0]
    return result


def _history(coefficients: Sequence[float], past: Sequence[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """What earlier rounds add to a row of C x."""
    total = np.zeros(shape)
    for weight, values in zip(coefficients[1:], reversed(past), strict=False):
        total += weight * values
    return total


def _check(coefficients: Sequence[float]) -> None:
    finite = bool(coefficients) and all(0 <= c < math.inf for c in coefficients)
    if not finite or coefficients[0] == 0 or any(later > earlier for earlier, later in pairwise(coefficients)):
        raise PrivacyError(
            "no sensitivity is known for these coefficients",
            hint="they must not be negative, and none larger than the one before; the first must not be zero",
        )
