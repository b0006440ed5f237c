"""How fine the grid is that updates are rounded to, how much noise each client adds on it, and what that hides.

Everything that decides privacy is a whole number of steps of the grid. A share of noise has a standard deviation of
2^k steps; the bound on the squares of a rounded update is a whole number that each client checks in integers; so the
sensitivity is exact, whatever floating point did to the update before.

**The grid.** With B the bound, d coordinates and C the clipping norm in steps, stochastic rounding keeps

    B >= min((C + sqrt(d))^2, C^2 + d/4 + a (C + sqrt(d)/2))

but for a chance of exp(-a^2/2), and then it is done again. B follows from the noise multiplier z by
z^2 B = `honest` * 4^k, and the step is the clipping norm over the largest C that B allows.

**The ring.** k is the least for which rounding costs next to nothing, or else the largest for which a sum stays inside,
but for a chance of WRAPPING over the signs of the rotation and the noise: n updates of norm C, with signs that nobody
knew when they were made, have coordinates of the sum beyond t n C / sqrt(d) with a chance of 2 exp(-t^2/2) (Hoeffding);
noise of variance V lies beyond x with a chance of 2 exp(-x^2 / (2 (V + x/3))) (Bernstein; the discrete Gaussian is
subgaussian, which is less); rounding adds n at most. A sum that leaves the ring is wrong in some coordinates, which
costs accuracy; a sum modulo the ring never tells more.

Source: Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), theorem 1, proposition 22 (norm bound, "beta" = exp(-a^2/2)) and
section 4. Departures: the noise in steps is fixed first and the step follows, so that few tables of noise are needed;
after MOST_TRIES an update is rounded towards zero, which never lengthens it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

from common.errors import PrivacyError
from common.privacy.distributed.sampler import DISTANCE_PER_DRAW, LARGEST_LOG2, SMALLEST_LOG2
from common.privacy.events import SharedNoise

WRAPPING_LOG2: Final = -20
WRAPPING: Final = 2.0**WRAPPING_LOG2
"""Chance that anything of a sum leaves the ring."""

DEVIATIONS: Final = 5.0
"""a: an update is rounded again with a chance below exp(-12.5) < 4e-6."""

_LN2: Final = 0.6931471805599453  # all else is IEEE arithmetic, and so the same everywhere
_MOST_BOUND: Final = 1 << 52
"""Squares of whole numbers up to here add up exactly in float64."""
_ENOUGH, _MOST_INFLATION = 1.005, 2.0
"""How many times as large rounding makes the noise: where a grid is fine enough, and what is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """What each client of a sum does to its update. All of it is public.

    Attributes:
        noise: Distribution of a share of noise.
        bits: Size of the ring.
        clients: Most members of a sum.
        honest: Fewest of them whose noise counts.
        clipping_norm: L2 bound on one client's update.
        dimensions: Values of an update.
        granularity: Step of the grid, in the update's own units.
        l2_squared: Bound on the squares of a rounded update, in squared steps.
        share_stddev: Standard deviation of one client's noise on each coordinate, in steps.
    """

    noise: SharedNoise
    bits: int
    clients: int
    honest: int
    clipping_norm: float
    dimensions: int
    granularity: float
    l2_squared: int
    share_stddev: int

    @property
    def draws(self) -> int:
        """Coordinates that are rounded and noised: `dimensions`, padded to a power of two."""
        return padded(self.dimensions)

    @property
    def l1(self) -> int:
        """Bound on the sizes of a rounded update's values added up, in steps: whole numbers are at most their squares.

        Guarantee: never below the largest such sum, which is a whole number.
        """
        return min(self.l2_squared, math.isqrt(self.draws * self.l2_squared))

    @property
    def share_variance(self) -> int:
        """Of one client's noise on each coordinate, in squared steps."""
        return self.share_stddev**2

    @property
    def variance(self) -> int:
        """Of the noise of `honest` clients together, in squared steps."""
        return self.honest * self.share_variance

    @property
    def distance(self) -> float:
        """Total variation distance of the noise of `honest` clients from the exact distribution, over one sum."""
        return self.honest * self.draws * DISTANCE_PER_DRAW

    @property
    def noise_multiplier(self) -> float:
        """Noise of the fewest honest clients over the sensitivity."""
        return math.sqrt(self.variance / self.l2_squared)

    @property
    def digest(self) -> bytes:
        """Names all of it, 32 bytes."""
        numbers = (self.bits, self.clients, self.honest, self.dimensions, self.l2_squared, self.share_stddev)
        text = "/".join((self.noise, *map(str, numbers), self.clipping_norm.hex(), self.granularity.hex()))
        return hashlib.sha256(b"coterie distributed noise v1/" + text.encode()).digest()


def mechanism_of(
    noise: SharedNoise,
    *,
    bits: int,
    clients: int,
    honest: int,
    clipping_norm: float,
    noise_multiplier: float,
    dimensions: int,
) -> Mechanism:
    """The mechanism of a noise multiplier: a grid that is fine enough, or the finest that fits the ring.

    Guarantee: `result.noise_multiplier >= noise_multiplier`, in floating point too. The same everywhere.

    Args:
        noise: Distribution of a share.
        bits: Size of the ring.
        clients: Most members of a sum.
        honest: Fewest of them whose noise counts.
        clipping_norm: L2 bound on one client's update.
        noise_multiplier: Noise of the honest ones over the sensitivity of the rounded sum.
        dimensions: Values of an update.

    Raises:
        PrivacyError: No grid fits the ring, or none of those is fine enough for so much noise over so many values.
    """
    if not (1 <= honest <= clients and dimensions >= 1 and bits >= 8):
        raise PrivacyError("noise is shared among some clients, over some values, in a ring")
    if not (0 < noise_multiplier < math.inf and 0 < clipping_norm < math.inf):
        raise PrivacyError(f"no noise has multiplier {noise_multiplier} at clipping norm {clipping_norm}")
    found = None
    for log2 in range(SMALLEST_LOG2, LARGEST_LOG2 + 1):
        bound = _bound(honest << 2 * log2, noise_multiplier)
        norm = scaled_norm(bound, padded(dimensions))
        reach = _reach(norm, clients, clients << 2 * log2, padded(dimensions))
        if bound > _MOST_BOUND or reach > (1 << bits - 1) - 1:
            break
        found = 1 << log2, bound, norm
        if norm * _ENOUGH >= math.sqrt(bound) > 0:
            break
    if found is None:
        raise PrivacyError(
            f"a sum of {clients} updates with noise of multiplier {noise_multiplier:g} does not fit a ring of {bits} "
            "bits",
            hint="take more secagg.bits",
        )
    share_stddev, bound, norm = found
    if not norm * _MOST_INFLATION >= math.sqrt(bound) > 0:
        raise PrivacyError(
            f"noise of multiplier {noise_multiplier:g} over {dimensions} values is too coarse a grid for them in a "
            f"ring of {bits} bits",
            hint="take more secagg.bits, train fewer parameters, or count on more honest sites in each sum",
        )
    return Mechanism(
        noise=noise,
        bits=bits,
        clients=clients,
        honest=honest,
        clipping_norm=clipping_norm,
        dimensions=dimensions,
        granularity=clipping_norm / norm,
        l2_squared=bound,
        share_stddev=share_stddev,
    )


def padded(dimensions: int) -> int:
    """The power of two that a vector is padded to."""
    return 1 << (dimensions - 1).bit_length()


def rounded_bound(norm: float, size: int) -> float:
    """What the squares of a rounded vector of a norm (in steps) add up to at most, but for a chance of exp(-a^2/2).

    Source: Kairouz, Liu, Steinke 2021, proposition 22. Checked against TensorFlow Federated's
    `inflated_l2_norm_bound`.
    """
    either = (norm + math.sqrt(size)) ** 2
    return min(either, norm * norm + size / 4 + DEVIATIONS * (norm + math.sqrt(size) / 2))


def scaled_norm(bound: int, size: int) -> float:
    """The largest norm, in steps, whose `rounded_bound` is within a bound; zero or less where there is none."""
    rest = bound - size / 4 - DEVIATIONS * math.sqrt(size) / 2
    likely = math.sqrt(rest + DEVIATIONS**2 / 4) - DEVIATIONS / 2 if rest > 0 else 0.0
    return max(likely, math.sqrt(bound) - math.sqrt(size))


def _bound(variance: int, noise_multiplier: float) -> int:
    """The largest bound on the squares to which noise of a variance has a multiplier."""
    bound = int(min(variance / noise_multiplier**2, 4.0 * _MOST_BOUND))
    while bound > 0 and math.sqrt(variance / bound) < noise_multiplier:
        bound -= 1
    return bound


def _reach(norm: float, clients: int, variance: int, size: int) -> float:
    """How far from zero a sum of all clients goes, in steps, but for a chance of WRAPPING over all coordinates."""
    log_chance = (size.bit_length() - 1 + 2 - WRAPPING_LOG2) * _LN2  # of ln(4 d / WRAPPING): half for either cause
    signal = clients * norm * min(1.0, math.sqrt(2 * log_chance / size))
    noise = log_chance / 3 + math.sqrt(log_chance**2 / 9 + 2 * variance * log_chance)
    return signal + noise + clients
