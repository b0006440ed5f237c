"""Noise and samples that privacy may rest on.

`keystream` turns a key into bits; `discrete_gaussian` turns bits into integers; `sources` are what others draw from,
and add noise to a sum on its grid; `prefetch` draws ahead of time.
"""

from common.privacy.noise.discrete_gaussian import DISTANCE_PER_DRAW, GRID_STDDEV
from common.privacy.noise.sources import (
    KeyedNoise,
    NoiseSource,
    SecureNoise,
    add_noise,
    choose,
    noise_stddev_for,
    noised,
    poisson_sample,
    rounded_sensitivity,
)

__all__ = [
    "DISTANCE_PER_DRAW",
    "GRID_STDDEV",
    "KeyedNoise",
    "NoiseSource",
    "SecureNoise",
    "add_noise",
    "choose",
    "noise_stddev_for",
    "noised",
    "poisson_sample",
    "rounded_sensitivity",
]
