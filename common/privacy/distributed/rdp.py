"""What a sum with shares of discrete noise tells, as Renyi divergence. Plain arithmetic, in steps of the grid.

Neighbours: the rounded update of one client is replaced by zero, so that the sum moves by a vector of whole numbers
whose squares come to `l2_squared` and whose sizes to `l1`. Rounding is random, but a divergence of mixtures is at most
the largest of their parts', so the bound on every rounded update is the sensitivity.
"""

from __future__ import annotations

import math

_ROUNDING = 1 + 1e-9
"""For the rounding of these few operations."""


def rdp_skellam(order: int, *, l2_squared: float, l1: float, variance: float) -> float:
    """Renyi divergence of order `order` of Skellam noise on every coordinate.

        a D2^2 / 2v + min( ((2a - 1) D2^2 + 6 D1) / 4v^2, 3 D1 / 2v )

    Args:
        order: a, a whole number above 1.
        l2_squared: D2^2.
        l1: D1.
        variance: v, of the noise of all shares that count together; a sum of Skellam values is one.

    Source: Agarwal, Kairouz, Liu 2021 (arXiv 2110.04995), theorem 3.5. Checked against `_skellam_rdp` in the authors'
        google-research/federated, distributed_dp/accounting_utils.py, and against the divergence itself in the tests.
    """
    first = order * l2_squared / (2 * variance)
    second = min(((2 * order - 1) * l2_squared + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return (first + second) * _ROUNDING


def rdp_distributed_discrete_gaussian(
    order: int, *, l2_squared: float, l1: float, variance: float, shares: int, dimensions: int
) -> float:
    """Renyi divergence of order `order` of a sum of discrete Gaussians on every coordinate.

        a/2 * min( D^2 + 2 t d / a, D^2 + 2 D1' t + t^2 d, (D + t sqrt(d))^2 )

    with D = D2 / s, D1' = D1 / s, s^2 = `variance` and t the distance of the sum from a discrete Gaussian of that
    parameter, which it nearly is.

    Args:
        order: a, above 1.
        l2_squared: D2^2.
        l1: D1.
        variance: Of the noise of all shares together; each has the parameter variance / shares, at least 1/4.
        shares: How many there are, 1 or more.
        dimensions: d.

    Source: Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), theorem 1 and proposition 14. Checked against
        `compute_rdp_dgaussian` and `ddgauss_epsilon` in the authors' google-research/federated,
        distributed_dp/accounting_utils.py, and against the divergence itself in the tests.
    """
    share = variance / shares
    if not share >= 0.25:
        raise ValueError("shares of discrete Gaussian noise have a parameter of at least 1/2")
    t = closeness(share, shares)
    ratio, size = math.sqrt(l2_squared / variance), l1 / math.sqrt(variance)
    half = order / 2
    divergences = (
        half * ratio**2 + t * dimensions,
        half * (ratio**2 + 2 * size * t + t * t * dimensions),
        half * (ratio + t * math.sqrt(dimensions)) ** 2,
    )
    return min(divergences) * _ROUNDING


def closeness(variance: float, shares: int) -> float:
    """T = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1)): how far a sum of n discrete Gaussians is from one.

    From k = 64 on k / (k + 1) is taken as 64 / 65, so that many shares cost no time.
    """
    exponent = -2 * math.pi**2 * variance
    terms = [math.exp(exponent * k / (k + 1)) for k in range(1, min(shares, 64))]
    return 10 * math.fsum([*terms, max(0, shares - 64) * math.exp(exponent * 64 / 65)])
