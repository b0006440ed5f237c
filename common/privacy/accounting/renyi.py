"""Renyi divergence of the sampled Gaussian at whole orders, and what it says about epsilon. Plain arithmetic.

Each step releases a sum of clipped contributions over a fresh Poisson sample, plus noise. Whoever holds the released
sums tells neighbouring data sets apart no better than these divergences allow.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from common.errors import PrivacyError

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Whole orders only: fractional ones need a series that does not always converge, and does not hold on a grid."""

_ROUNDING = 1e-9
"""Relative error of the sums below is far smaller; every divergence is raised by this much."""

_LAST_DIGITS = 1e-13
"""And epsilon by this, relative to the terms that it is added up from."""


@lru_cache(maxsize=65536)
def renyi_divergence(noise_multiplier: float, sampling_rate: float, order: int) -> float:
    """Renyi divergence of one sampled Gaussian at a whole order, under add/remove.

    With mu_0 and mu_1 the noise without and with one unit's contribution, q the rate and a the order, it is
    log E_{mu_0} [(1 - q + q mu_1/mu_0)^a] / (a - 1). The binomial expansion's terms are moments exp(k (k - 1) / 2 s^2)
    of the noise, and the binomial weights sum to one, so that

        (a - 1) D = log(1 + sum_{k=2}^{a} C(a, k) (1 - q)^{a-k} q^k (exp(k (k - 1) / 2 s^2) - 1)).

    No term is negative: nothing cancels, however rare the sample and however much the noise.

    Guarantee:
        Never below the true divergence, in either direction, also for the discrete Gaussian on an integer grid where
        the contribution is a vector of that grid: the k-th moment is then a sum over the lattice of exactly the same
        Gaussian shifted by k times that vector, which is a shift of the lattice onto itself.

    Raises:
        PrivacyError: The result is not a number, or the arguments are not in range.

    Source:
        Mironov, Talwar, Zhang 2019, theorem 5 (adding costs more than removing; it needs a reflection that swaps mu_0
        and mu_1, which the grid has, too) and section 3.3. Discrete Gaussian: Canonne, Kamath, Steinke 2020.
    """
    check_range(noise_multiplier, sampling_rate)
    try:
        scale = 0.5 / noise_multiplier**2
    except ArithmeticError as e:
        raise incomputable() from e
    if sampling_rate == 1:
        divergence = order * scale
    else:
        k, log_choices = _log_choices(order)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            exponents = k * (k - 1) * scale
            log_moments = np.where(
                exponents > 1, exponents + np.log1p(-np.exp(-exponents)), np.log(np.expm1(exponents))
            )
            log_weights = log_choices + k * math.log(sampling_rate) + (order - k) * math.log1p(-sampling_rate)
            log_excess = np.logaddexp.reduce(log_weights + log_moments)
            divergence = float(np.logaddexp(0.0, log_excess)) / (order - 1)
    if not divergence > 0:  # no divergence is zero, and NaN compares as false
        raise incomputable()
    return divergence * (1 + _ROUNDING)


def epsilon_at(order: int, divergence: float, delta: float) -> float:
    """Epsilon at `delta` that a Renyi divergence at one order implies; infinity where `delta` is not positive.

    Source: Canonne, Kamath, Steinke 2020, proposition 12.
    """
    if not delta > 0:
        return math.inf
    epsilon = divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, epsilon + _LAST_DIGITS * (1 + divergence - math.log(delta)))


def check_range(noise_multiplier: float, sampling_rate: float) -> None:
    """Raise PrivacyError where noise and rate are not those of a mechanism that can be counted."""
    if not (0 < noise_multiplier < math.inf and 0 < sampling_rate <= 1):
        raise PrivacyError(
            f"noise {noise_multiplier} at sampling rate {sampling_rate} cannot be counted", hint="both must be positive"
        )


def incomputable() -> PrivacyError:
    """What is raised where a figure comes out as none: never a number that is too small."""
    return PrivacyError("the spent budget cannot be computed", hint="report the settings of this run as a bug")


@lru_cache(maxsize=len(ORDERS))
def _log_choices(order: int) -> tuple[np.ndarray, np.ndarray]:
    """2 to `order`, and the logarithms of `order` choose each of them."""
    k = np.arange(2.0, order + 1)
    return k, np.array([math.log(math.comb(order, int(i))) for i in k])
