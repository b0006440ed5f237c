"""Privacy of Gaussians by high-precision arithmetic that shares nothing with the accountants."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mpf
from scipy.special import ndtr


def gaussian_delta(epsilon: float, noise: float) -> mpf:
    """Delta of one Gaussian with sensitivity 1 (Balle, Wang 2018, theorem 8)."""
    a, b = 1 / (2 * mpf(noise)), mpf(epsilon) * noise
    return mpmath.ncdf(a - b) - mpmath.exp(epsilon) * mpmath.ncdf(-a - b)


def sampled_delta(epsilon: float, noise: float, rate: float, *, adding: bool) -> mpf:
    """Delta of one sampled Gaussian under add/remove, in one of both directions, in closed form.

    The ratio 1 - q + q exp((2x - 1) / 2 s^2) of the mixture to the noise rises with x, so the sets on which one density
    exceeds e^epsilon times the other are half-lines.
    """
    q, s = mpf(rate), mpf(noise)

    def threshold(ratio: mpf) -> mpf:
        return s**2 * mpmath.log((ratio - 1 + q) / q) + mpf(1) / 2

    def above(x: mpf, mean: int) -> mpf:
        return mpmath.ncdf((mean - x) / s)

    if adding:  # the mixture against the noise
        ratio = mpmath.exp(epsilon)
        if ratio <= 1 - q:
            return 1 - ratio
        t = threshold(ratio)
        return (1 - q) * above(t, 0) + q * above(t, 1) - ratio * above(t, 0)
    ratio = mpmath.exp(-mpf(epsilon))  # the noise against the mixture
    if ratio <= 1 - q:
        return mpf(0)
    t = threshold(ratio)
    below0, below1 = 1 - above(t, 0), 1 - above(t, 1)
    return below0 - ((1 - q) * below0 + q * below1) / ratio


def replaced_delta(epsilon: float, noise: float, rate: float) -> mpf:
    """Delta of one sampled Gaussian where the one unit is replaced by its opposite."""
    q, s = mpf(rate), mpf(noise)

    def mixture(mean: int, x: mpf) -> mpf:
        return (1 - q) * mpmath.npdf(x, 0, s) + q * mpmath.npdf(x, mean, s)

    def log_ratio(x: mpf) -> mpf:
        return mpmath.log(mixture(1, x) / mixture(-1, x)) - epsilon

    edge = 12 * noise + 2
    low, high = mpf(-edge), mpf(edge)
    for _ in range(60):  # it rises with x
        middle = (low + high) / 2
        low, high = (low, middle) if log_ratio(middle) > 0 else (middle, high)

    def tail(mean: int) -> mpf:
        return (1 - q) * mpmath.ncdf(-high / s) + q * mpmath.ncdf((mean - high) / s)

    return tail(1) - mpmath.exp(epsilon) * tail(-1)


def two_steps_delta(epsilon: float, noise: float, rate: float) -> float:
    """Delta of two sampled Gaussians (adding): the second's delta, averaged over what the first gave away."""
    x = np.linspace(-10 * noise, 10 * noise + 1, 20001)
    ratio = 1 - rate + rate * np.exp((2 * x - 1) / (2 * noise**2))
    density = ratio * np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    left = math.exp(epsilon) / ratio  # e to what the second step may still give away
    inside = np.maximum(left - 1 + rate, np.finfo(float).tiny)
    threshold = noise**2 * np.log(inside / rate) + 0.5
    above0, above1 = ndtr(-threshold / noise), ndtr((1 - threshold) / noise)
    second = np.where(left <= 1 - rate, 1 - left, (1 - rate) * above0 + rate * above1 - left * above0)
    return float(np.trapezoid(density * second, x))


def renyi_moment(order: int, noise: float, rate: float) -> mpf:
    """(order - 1) times the Renyi divergence of one sampled Gaussian, by the plain binomial sum."""
    q, variance = mpf(rate), mpf(noise) ** 2
    return mpmath.log(
        mpmath.fsum(
            mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp(k * (k - 1) / (2 * variance))
            for k in range(order + 1)
        )
    )


def least_epsilon(delta_of: Callable[[float], float], delta: float) -> float:
    """The least epsilon, to 1e-7, at which a falling curve is at most `delta`."""
    if delta_of(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return low
