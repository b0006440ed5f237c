"""A random rotation that everybody knows: it spreads an update evenly over its coordinates, so that none needs room.

Signs from a public seed, then the Walsh-Hadamard transform, scaled so that lengths stay. The seed need not be secret:
privacy does not rest on it. It only has to be one that updates do not depend on.

Source: Ailon, Chazelle 2006 (signs and transform); Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), section 4.2.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.privacy.noise.keystream import Keystream

Vector = NDArray[np.float64]

_LARGEST_FACTOR_LOG2 = 8


def rotate(values: NDArray[np.floating[Any]], *, seed: bytes, size: int, scale: float = 1.0) -> Vector:
    """float64[size], `scale` times as long as float[d], which is padded with zeros.

    Args:
        values: float[d].
        seed: 32 bytes, public.
        size: A power of two, d or more.
        scale: What the values are multiplied by.
    """
    padded = np.zeros(size)
    used = padded[: len(values)]
    np.multiply(values, _signs(seed, size)[: len(values)], out=used, dtype=np.float64)
    used *= scale
    return _transformed(padded)


def unrotate(values: Vector, *, seed: bytes, dimensions: int) -> Vector:
    """float64[dimensions]: what was rotated, up to rounding in float64."""
    return _transformed(values)[:dimensions] * _signs(seed, len(values))[:dimensions]


def _signs(seed: bytes, size: int) -> NDArray[np.int8]:
    """int8[size] of 1 and -1."""
    words = Keystream(seed).words((size + 63) // 64)
    return 1 - 2 * np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), count=size).view(np.int8)


def _transformed(values: Vector) -> Vector:
    """The orthonormal Walsh-Hadamard transform, which is its own inverse, of float64[2^k].

    It is the Kronecker product of small ones, each a product of matrices along one axis: what BLAS is good at.
    """
    size, inner = len(values), 1
    if size == 1:
        return values.copy()
    while inner < size:
        factor = min(1 << _LARGEST_FACTOR_LOG2, size // inner)
        matrix = _hadamard(factor)
        if inner == 1:
            values = (values.reshape(-1, factor) @ matrix).reshape(-1)
        else:
            values = (matrix @ values.reshape(-1, factor, inner)).reshape(-1)
        inner *= factor
    values /= math.sqrt(size)
    return values


@cache
def _hadamard(size: int) -> Vector:
    """float64[size, size] of 1 and -1, symmetric."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
