"""Renyi divergences of distributed noise: never below the divergence itself, which is added up term by term here."""

import math

import numpy as np
import pytest

from common.privacy.distributed.rdp import closeness, rdp_distributed_discrete_gaussian, rdp_skellam

SHIFTS = (1, 2, 5, 10, 30)


def log_sum(values, axis=None):
    """Logarithm of the sum of exponentials."""
    top = values.max(axis=axis, keepdims=True)
    summed = top + np.log(np.exp(values - top).sum(axis=axis, keepdims=True))
    return summed.item() if axis is None else summed.squeeze(axis)


def divergence(log_law, shift, order):
    """Renyi divergence between a law on whole numbers and the same law moved by `shift`."""
    moved, kept = log_law[:-shift], log_law[shift:]
    return log_sum(order * moved + (1 - order) * kept) / (order - 1)


def skellam(variance, reach):
    """Logarithms of P(-reach) to P(reach): every difference of two Poisson values, one by one."""
    mean, most = variance / 2, int(variance / 2 + 60 * math.sqrt(variance)) + reach + 200
    logs = np.arange(most) * math.log(mean) - mean - [math.lgamma(k + 1) for k in range(most)]
    upper = np.array([log_sum(logs[k:] + logs[: most - k]) for k in range(reach + 1)])
    return np.concatenate((upper[:0:-1], upper))


def discrete_gaussians(variance, shares, reach):
    """Logarithms of P(-reach) to P(reach) for a sum of discrete Gaussians, each of this parameter."""
    places = np.arange(-reach, reach + 1)
    one = -(places**2) / (2 * variance)
    one -= log_sum(one)
    apart = places[:, None] - places[None, :]
    moves = np.where(np.abs(apart) <= reach, one[np.clip(apart + reach, 0, 2 * reach)], -np.inf)
    law = one
    for _ in range(shares - 1):
        law = log_sum(moves + law, axis=1)
    return law


@pytest.mark.parametrize("variance", [1, 2, 4, 16, 64, 256])
def test_skellam_is_never_counted_too_low(variance):
    """In one dimension, from one step of sensitivity to thirty, at low and high orders."""
    law = skellam(variance, 40 * math.isqrt(variance) + 400)
    for shift in SHIFTS:
        for order in (2, 3, 8, 32, 128):
            bound = rdp_skellam(order, l2_squared=shift**2, l1=shift, variance=variance)
            assert bound >= divergence(law, shift, order)


def test_skellam_is_close_to_the_gaussian():
    """With much noise the bound is within a hundredth of what a Gaussian of that variance tells."""
    bound = rdp_skellam(16, l2_squared=2500, l1=2500, variance=250_000)
    assert 1 < bound / (16 * 2500 / 500_000) < 1.01


@pytest.mark.parametrize("variance", [0.25, 0.5, 1, 4, 16])
@pytest.mark.parametrize("shares", [1, 2, 3, 6])
def test_a_sum_of_discrete_gaussians_is_never_counted_too_low(variance, shares):
    """The sum is no discrete Gaussian; what that costs is in the bound, down to a parameter of a half."""
    reach = 320
    law = discrete_gaussians(variance, shares, reach)
    for shift in SHIFTS:
        for order in (2, 3, 8, 32):
            if shift * order > reach - 60:  # the terms that matter most would be cut off
                continue
            bound = rdp_distributed_discrete_gaussian(
                order, l2_squared=shift**2, l1=shift, variance=shares * variance, shares=shares, dimensions=1
            )
            assert bound >= divergence(law, shift, order)


def test_the_sum_costs_more_than_one_gaussian_only_at_little_noise():
    """Figures of the paper's formula, worked out by hand: 10 exp(-pi^2) for two shares of variance one."""
    assert closeness(1.0, 1) == 0
    assert closeness(1.0, 2) == pytest.approx(10 * math.exp(-(math.pi**2)))
    assert closeness(1.0, 3) == pytest.approx(10 * (math.exp(-(math.pi**2)) + math.exp(-4 * math.pi**2 / 3)))
    assert closeness(256.0, 1000) < 1e-300


def test_many_shares_are_counted_no_lower_than_one_by_one():
    """Beyond 64 shares their terms are taken together, each as the largest of them."""
    exact = 10 * math.fsum(math.exp(-2 * math.pi**2 * 0.5 * k / (k + 1)) for k in range(1, 500))
    assert exact <= closeness(0.5, 500) < 1.2 * exact


def test_each_of_the_three_bounds_is_the_least_somewhere():
    """The bound is the least of three; with many coordinates, with few, and where the step is short."""

    def bound(order, shift, dimensions):
        ratio, t = shift / math.sqrt(3), closeness(1.5, 2)
        l1 = shift * math.sqrt(dimensions)
        parts = (
            order / 2 * ratio**2 + t * dimensions,
            order / 2 * (ratio**2 + 2 * l1 / math.sqrt(3) * t + t * t * dimensions),
            order / 2 * (ratio + t * math.sqrt(dimensions)) ** 2,
        )
        given = rdp_distributed_discrete_gaussian(
            order, l2_squared=shift**2, l1=l1, variance=3.0, shares=2, dimensions=dimensions
        )
        assert given == pytest.approx(min(parts), rel=1e-8)
        return parts.index(min(parts))

    assert {bound(64, 10, 4), bound(2, 1, 1), bound(2, 1, 4)} >= {0, 1}


def test_too_little_noise_has_no_bound():
    """Shares below a parameter of a half are not covered by the theorem."""
    with pytest.raises(ValueError, match="at least 1/2"):
        rdp_distributed_discrete_gaussian(2, l2_squared=1, l1=1, variance=0.4, shares=2, dimensions=1)
