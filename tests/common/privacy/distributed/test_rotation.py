"""The public rotation: lengths stay, it can be undone, and it spreads what was in one place."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.distributed.rotation import rotate, unrotate

SEED = bytes(range(32))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=70), st.binary(min_size=32, max_size=32), st.integers(0, 3))
@settings(deadline=None)
def test_it_can_be_undone_and_keeps_lengths(values, seed, more):
    """Any vector, padded to any power of two: the inverse gives it back up to rounding in float64."""
    values = np.array(values)
    size = 1 << (len(values) - 1).bit_length() + more
    rotated = rotate(values, seed=seed, size=size)
    scale = max(1.0, float(np.abs(values).max())) * math.sqrt(len(values))
    assert rotated.shape == (size,)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values), rel=1e-12, abs=1e-12)
    assert np.abs(unrotate(rotated, seed=seed, dimensions=len(values)) - values).max() <= 1e-13 * scale


@pytest.mark.parametrize("size", [1, 2, 8, 256, 512, 1 << 13, 1 << 17])
def test_it_is_the_walsh_hadamard_transform(size):
    """Of one value in one place: entry j has its size over sqrt(size), and the sign of the bits that both share."""
    for place in {0, 1, size // 3, size - 1} & set(range(size)):
        values = np.zeros(size)
        values[place] = 3.0
        rotated = rotate(values, seed=SEED, size=size) * math.sqrt(size) / 3
        shared = np.array([(j & place).bit_count() for j in range(size)])
        assert np.allclose(rotated * rotated[0], (-1.0) ** shared, atol=1e-12)


def test_signs_come_from_the_seed():
    """Half of the values change sign, others for another seed; the same seed gives the same rotation."""
    values = np.ones(4096)
    first = rotate(values, seed=SEED, size=4096)
    assert np.array_equal(first, rotate(values, seed=SEED, size=4096))
    assert not np.allclose(first, rotate(values, seed=bytes(32), size=4096))
    assert abs(first[0]) < 6.2, "the sum of 4096 signs over 64: beyond that with a chance below 1e-9"


def test_it_spreads_what_stands_in_one_place():
    """An update in a few coordinates takes up none of them for itself: the largest value falls as sqrt(ln d / d)."""
    values = np.zeros(1 << 15)
    values[:7] = 1.0
    rotated = rotate(values, seed=SEED, size=1 << 15)
    most = math.sqrt(7 * 2 * math.log(2 * (1 << 15) / 1e-9) / (1 << 15))
    assert np.abs(rotated).max() < most < 0.12


def test_it_scales_on_the_way():
    """Values of any floating type, times a factor, in float64."""
    values = np.arange(5, dtype=np.float32)
    assert np.allclose(rotate(values, seed=SEED, size=8, scale=2.5), 2.5 * rotate(values * 1.0, seed=SEED, size=8))
    assert rotate(values, seed=SEED, size=8).dtype == np.float64
