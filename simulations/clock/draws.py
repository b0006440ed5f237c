"""Numbers that follow from a seed and words alone: whoever asks, in whatever order, gets the same ones.

A device is drawn when somebody looks at it, and forgotten afterwards. Nothing private rests on these numbers.
"""

from __future__ import annotations

import math
import struct
from hashlib import blake2b
from statistics import NormalDist
from typing import Final

_SPARE_BITS, _UNIT = 12, 2.0**-52
_NORMAL: Final = NormalDist()
_halves: Final = struct.Struct("<QQ").unpack


def uniforms(seed: int, *words: str | int) -> tuple[float, float]:
    """Two independent numbers strictly between 0 and 1, each of 52 random bits."""
    digest = blake2b(f"{seed}/{words}".encode(), digest_size=16, person=b"coterie devices").digest()
    first, second = _halves(digest)
    return ((first >> _SPARE_BITS) + 0.5) * _UNIT, ((second >> _SPARE_BITS) + 0.5) * _UNIT


def log_normal(spread: float, uniform: float) -> float:
    """The factor by which a device differs from the median one.

    Args:
        spread: Standard deviation of the factor's logarithm; 0 gives exactly 1.
        uniform: Where in the distribution, strictly between 0 and 1.
    """
    return math.exp(spread * _NORMAL.inv_cdf(uniform)) if spread else 1.0
