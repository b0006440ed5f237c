"""Noise, sampling masks and choices that privacy may rest on, from a stream cipher keyed by the operating system.

Opacus draws its noise from a seeded Mersenne Twister, and whoever learns the seed subtracts it exactly; and it adds
floating-point numbers, whose last bits betray the sum (Mironov 2012). Here a sum is rounded to a grid, and integers of
a discrete Gaussian (`discrete_gaussian`) are added on that same grid; integers below 2^53 are exact in float64. Noise
on a grid over a sum that is not on it would reveal the sum modulo the grid.

    grid = noise_stddev / GRID_STDDEV

Rounding moves every coordinate by up to half a step, which `rounded_sensitivity` adds to the sensitivity.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.noise.discrete_gaussian import GRID_STDDEV, DiscreteGaussian
from common.privacy.noise.keystream import KEY_BYTES, Keystream

_LARGEST_STEPS = 2.0**44
"""Most steps from zero that a tensor may lie. A value's product with 1/grid is then off by less than 2^-8 of a step."""

_ROUNDING = 1 + 2.0**-6
"""Most steps by which rounding can move two values apart, with that error on either side."""

_SLACK = 1 + 2.0**-32
"""For the standard deviation that GAUSSIAN_STDDEV lacks, and for rounding in the few operations on scalars here."""

_BLOCK = 1 << 16


class NoiseSource(Protocol):
    """Where noise and sampling masks come from. The two methods may be called by two threads at a time."""

    def integers(self, count: int) -> NDArray[np.int32]:
        """int32[count] independent values of the discrete Gaussian with parameter GRID_STDDEV."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """uint64[count] of random bits."""


class KeyedNoise:
    """Noise and random bits from two AES-256-CTR streams, each under a key of its own.

    How much noise has been drawn does not change the random bits, nor the other way round, so noise can be drawn ahead
    of time (`prefetch`).

    Guarantee: Nothing is handed out twice, by whatever thread it is asked for. A source refuses to work after a fork,
    and cannot be copied or pickled.
    """

    def __init__(self, *, noise_key: bytes, mask_key: bytes) -> None:
        self._noise_stream, self._mask_stream = Keystream(noise_key), Keystream(mask_key)
        self._noise = DiscreteGaussian(self._noise_stream)
        self._noise_lock, self._mask_lock = Lock(), Lock()

    def __repr__(self) -> str:
        """Without the keys."""
        return f"{type(self).__name__}()"

    def integers(self, count: int) -> NDArray[np.int32]:
        """int32[count] independent values of the discrete Gaussian with parameter GRID_STDDEV."""
        self._noise_stream.check_process()  # before the lock, which a thread may have held at the fork
        with self._noise_lock:
            return self._noise.draw(count)

    def words(self, count: int) -> NDArray[np.uint64]:
        """uint64[count] of random bits."""
        self._mask_stream.check_process()
        with self._mask_lock:
            return self._mask_stream.words(count)


class SecureNoise(KeyedNoise):
    """Noise under keys that the operating system just drew.

    Guarantee: That of `KeyedNoise`, and two sources never share a key.
    """

    def __init__(self) -> None:
        super().__init__(noise_key=os.urandom(KEY_BYTES), mask_key=os.urandom(KEY_BYTES))


def rounded_sensitivity(clipping_norm: float, *, summation_error: float, noise_stddev: float, dimensions: int) -> float:
    """L2 distance that the rounded sums of neighbouring data sets can have: C (1 + error) + grid sqrt(d), rounded up.

    Guarantee: `noised` and `add_noise`, over all `dimensions` coordinates together, are the Gaussian mechanism of noise
    multiplier `noise_stddev / rounded_sensitivity(...)` (or more) with post-processing, up to DISTANCE_PER_DRAW a
    coordinate.

    Args:
        clipping_norm: L2 distance of the exact sums.
        summation_error: By how much rounding in the sums can increase it, relative to it.
        noise_stddev: Absolute.
        dimensions: Coordinates of the sum.
    """
    grid = noise_stddev / GRID_STDDEV
    return (clipping_norm * (1 + summation_error) + grid * math.sqrt(dimensions) * _ROUNDING) * _SLACK


def noise_stddev_for(
    noise_multiplier: float, clipping_norm: float, *, summation_error: float, dimensions: int
) -> float:
    """The least noise whose ratio to the rounded sensitivity, which grows with it, is `noise_multiplier`.

    Guarantee: noise_stddev / rounded_sensitivity(...) >= noise_multiplier, in floating point too.

    Raises:
        PrivacyError: The model has too many parameters for that multiplier: rounding alone would need all the noise.
    """
    rounding = noise_multiplier * math.sqrt(dimensions) / GRID_STDDEV * _ROUNDING * _SLACK
    if not rounding < 1:
        raise PrivacyError(
            f"noise of multiplier {noise_multiplier} over {dimensions} parameters is too coarse a grid for them",
            hint="lower the noise multiplier, or train fewer parameters",
        )
    stddev = noise_multiplier * clipping_norm * (1 + summation_error) * _SLACK / (1 - rounding)
    if not 0 < stddev < math.inf:
        raise PrivacyError(f"no noise has multiplier {noise_multiplier} at clipping norm {clipping_norm}")
    step = 2.0**-52
    while (
        stddev
        / rounded_sensitivity(
            clipping_norm, summation_error=summation_error, noise_stddev=stddev, dimensions=dimensions
        )
        < noise_multiplier
    ):
        stddev *= 1 + step
        step *= 2
    return stddev


def noised(values: NDArray[np.float64], *, noise_stddev: float, source: NoiseSource) -> NDArray[np.float64]:
    """Values rounded to the noise's grid, plus noise: float64[n], integers times the grid.

    Args:
        values: float64[n].
        noise_stddev: Absolute.
        source: Secure noise.

    Raises:
        PrivacyError: A value is not finite, the norm is more than 2^24 noise standard deviations, or there is no noise.
            Nothing has been drawn.
    """
    _check(torch.from_numpy(values), noise_stddev)
    out = np.empty(values.shape)
    _add(values, source.integers(values.size), noise_stddev, out)
    return out


def add_noise(
    sums: Sequence[Tensor], *, noise_stddev: float, source: NoiseSource, divisor: float = 1.0
) -> list[Tensor]:
    """`noised` for tensors: what is released of a model's sums, one tensor for each parameter.

    Args:
        sums: Of any shape, floating-point type and device; float64 keeps the summation error small.
        noise_stddev: Absolute; of every coordinate of every tensor.
        source: Secure noise. It is drawn on the CPU, all at once.
        divisor: Public constant that what is released is divided by, in the same pass.

    Returns:
        float32 of the sums' shapes, on their devices; on the CPU they are parts of one block of memory.

    Raises:
        PrivacyError: As for `noised`.
    """
    for total in sums:
        _check(total, noise_stddev)
    sizes = [total.numel() for total in sums]
    noise = source.integers(sum(sizes))
    out = np.empty(sum(sizes), dtype=np.float32)
    results, start = [], 0
    for total, size in zip(sums, sizes, strict=True):
        part = noise[start : start + size]
        if total.device.type == "cpu":
            place = out[start : start + size]
            _add(total.detach().reshape(-1).to(torch.float64).numpy(), part, noise_stddev, place, divisor)
            results.append(torch.from_numpy(place).view(total.shape))
        else:
            results.append(_add_on_device(total.detach(), part, noise_stddev, divisor))
        start += size
    return results


def _check(values: Tensor, noise_stddev: float) -> None:
    """Refuse what cannot be rounded to the grid exactly enough."""
    if not 2.0**-400 < noise_stddev < 2.0**400:  # so that squares neither vanish nor overflow
        raise PrivacyError(f"noise of standard deviation {noise_stddev} cannot be drawn")
    norm = torch.linalg.vector_norm(values.detach(), dtype=torch.float64).item()  # bounds every value, in one pass
    if not norm <= _LARGEST_STEPS / GRID_STDDEV * noise_stddev:
        raise PrivacyError("what is to be released with noise is not finite, or far larger than the noise")


def _add(
    values: NDArray[np.float64],
    noise: NDArray[np.int32],
    noise_stddev: float,
    out: NDArray[np.floating],
    divisor: float = 1.0,
) -> None:
    """Set `out` to (round(values / grid) + noise) * grid / divisor, a block at a time so that it stays in the cache."""
    steps, grid = GRID_STDDEV / noise_stddev, noise_stddev / GRID_STDDEV / divisor
    room = np.empty(min(_BLOCK, len(values)))
    for start in range(0, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        exact = room[: len(values) - start]
        np.multiply(values[block], steps, out=exact)
        np.rint(exact, out=exact)
        np.add(exact, noise[block], out=exact)
        np.multiply(exact, grid, out=exact)
        out[block] = exact


def _add_on_device(total: Tensor, noise: NDArray[np.int32], noise_stddev: float, divisor: float = 1.0) -> Tensor:
    """`_add` where the sum is: the same operations in the same order."""
    exact = total.to(torch.float64).mul(GRID_STDDEV / noise_stddev).round_()
    exact += torch.from_numpy(noise).to(total.device).view(total.shape)
    return exact.mul_(noise_stddev / GRID_STDDEV / divisor).to(torch.float32)


def poisson_sample(count: int, *, rate: float, source: NoiseSource) -> Tensor:
    """int64[k]: the indices below `count` that a Poisson sample takes, each independently of the others.

    Guarantee: Each is taken with probability floor(rate * 2^64) / 2^64: never above `rate`, and below it by less than
    2^-64.

    Edge cases: may be empty, and then the step still takes place: noise is added and the step is counted.
    """
    if not 0 <= rate <= 1:
        raise PrivacyError(f"{rate} is not a sampling rate")
    threshold = int(math.ldexp(rate, 64))
    if threshold == 1 << 64:
        return torch.arange(count)
    taken = [
        start + np.flatnonzero(source.words(min(_BLOCK, count - start)) < np.uint64(threshold))
        for start in range(0, count, _BLOCK)
    ]
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *taken]))


def choose(sizes: NDArray[np.int64], source: NoiseSource) -> NDArray[np.int64]:
    """int64[k]: for each group, by its size, the index of one member, all of them equally likely.

    Guarantee: Exactly uniform: words that would favour some members are drawn again.

    Args:
        sizes: int64[k], 1 or more each.
        source: Secure bits.
    """
    if len(sizes) and sizes.min() < 1:
        raise PrivacyError("nothing can be chosen from a group without members")
    bounds = sizes.astype(np.uint64)
    words = source.words(len(bounds))
    uneven = (-bounds) % bounds  # 2^64 modulo the size: as many words are left over
    while len(again := np.flatnonzero(words < uneven)):
        words[again] = source.words(len(again))
    return (words % bounds).astype(np.int64)
