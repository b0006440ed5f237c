"""Shares of noise: their tables recomputed at high precision, their draws followed bit by bit, and put to the test.

Every statistical test here raises a false alarm with probability at most 1e-9.
"""

import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from common.errors import PrivacyError
from common.privacy.distributed import sampler
from common.privacy.distributed.sampler import DISTANCE_PER_DRAW, ShareNoise, Table, table_of
from common.privacy.noise.keystream import Keystream

FALSE_ALARM = 1e-9
NOISES = ("skellam", "discrete-gaussian")


def boundaries(noise, log2):
    """P(|x| <= k) in units of 2^-127, as whole numbers."""
    table = table_of(noise, log2)
    return [int(high) << 64 | int(low) for high, low in zip(table.high, table.low, strict=True)]


def exact_law(noise, log2, most):
    """P(|x| = k) for k from 0 to `most`, to 80 digits."""
    variance = mpmath.mpf(4) ** log2
    if noise == "skellam":
        law = [mpmath.exp(-variance) * mpmath.besseli(k, variance) for k in range(most + 1)]
    else:
        weights = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * variance)) for k in range(40 << log2)]
        total = 2 * mpmath.fsum(weights) - 1
        law = [weight / total for weight in weights[: most + 1]]
    return [law[0], *(2 * value for value in law[1:])]


@pytest.mark.parametrize("noise", NOISES)
def test_the_table_is_the_law(noise):
    """The whole table, against Bessel functions and exponentials of 80 digits: within the distance that is stated."""
    bits = boundaries(noise, 4)
    with mpmath.workdps(80):
        exact = exact_law(noise, 4, len(bits))
        below, table = mpmath.mpf(0), [*bits, 1 << 127]
        distance = mpmath.mpf(0)
        for k, value in enumerate(table):
            drawn = mpmath.mpf(value - (table[k - 1] if k else 0)) / (1 << 127)
            distance += abs(drawn - exact[k])
            below += exact[k]
        distance = (distance + 1 - below) / 2
    assert distance < DISTANCE_PER_DRAW / 2


def skellam_by_inversion(log2, k):
    """P(k) from the characteristic function exp(v (cos t - 1)): a sum over 40 points a deviation is exact to 1e-100."""
    points, total = 40 << log2, mpmath.mpf(1)
    for j in range(1, 200):
        angle = 2 * mpmath.pi * j / points
        total += 2 * mpmath.exp(mpmath.mpf(4) ** log2 * (mpmath.cos(angle) - 1)) * mpmath.cos(k * angle)
    return total / points


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("log2", [10, 16])
def test_wide_tables_are_the_law_where_it_is_looked_at(noise, log2):
    """Single probabilities near zero, on the flank and in the tail."""
    table = table_of(noise, log2)
    with mpmath.workdps(80):
        variance = mpmath.mpf(4) ** log2
        root = mpmath.sqrt(2 * mpmath.pi * variance)  # the sum of all weights, by Poisson summation, to 1e-1000
        for k in (1, 1 << log2, 5 << log2, 12 << log2):
            if noise == "skellam":
                exact = 2 * skellam_by_inversion(log2, k)
            else:
                exact = 2 * mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * variance)) / root
            below, here = (int(table.high[i]) << 64 | int(table.low[i]) for i in (k - 1, k))
            assert abs(mpmath.mpf(here - below) / (1 << 127) - exact) < mpmath.mpf(2) ** -120


@pytest.mark.parametrize("log2", [4, 9, 16])
def test_the_cut_is_far_enough_out(log2):
    """Beyond the table lies less than 2^-125, by Bernstein's inequality."""
    cut = sampler._cut(log2)
    assert 2 * math.exp(-(cut**2) / (2 * (4**log2 + cut / 3))) < 2.0**-125


@pytest.mark.parametrize("noise", NOISES)
def test_the_draws_have_the_law(noise):
    """Counts over 400,000 values, and mean and variance, are those of the exact law."""
    values = ShareNoise(noise, log2=4, stream=Keystream(b"law of shares of noise".ljust(32))).draw(400_000)
    law = stats.skellam(128, 128) if noise == "skellam" else None
    edges = np.arange(-44, 45)
    if law is not None:
        expected = law.pmf(edges)
    else:
        expected = np.exp(-(edges**2) / 512) / np.exp(-(np.arange(-400, 401) ** 2) / 512).sum()
    outside = (1 - expected.sum()) / 2
    expected = 400_000 * np.array([outside, *expected, outside])
    counted = [(values < -44).sum(), *np.bincount(values[np.abs(values) <= 44] + 44), (values > 44).sum()]
    assert stats.chisquare(counted, expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("log2", [8, 12])
def test_wide_draws_have_the_variance(noise, log2):
    """The standard deviation is 2^log2 steps, the mean zero."""
    count = 400_000
    values = ShareNoise(noise, log2=log2, stream=Keystream(b"wide shares".ljust(32))).draw(count) / 2.0**log2
    threshold = stats.norm.isf(FALSE_ALARM / 8)
    assert abs(values.mean()) < threshold / math.sqrt(count)
    assert abs((values**2).mean() - 1) < threshold * math.sqrt(2.01 / count)


class Script:
    """A stream that gives the words it was told to."""

    def __init__(self, *words):
        self._words = list(words)

    def words(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)

    def fill(self, _room, count):
        return self.words(count)


def scripted(table, *words):
    noise = ShareNoise("skellam", log2=4, stream=Keystream(bytes(32)))
    noise._table, noise._stream = table, Script(*words)
    return noise


def test_a_draw_is_decided_by_its_bits():
    """One bit of sign, 63 bits of size; where these tie with the table, 64 bits more."""
    table = Table(high=np.array([10, 20, 20, 20, 30], np.uint64), low=np.array([5, 7, 8, 9, 0], np.uint64))
    plain = scripted(table, 9 << 1, 11 << 1, 11 << 1 | 1, 21 << 1, 31 << 1, 31 << 1 | 1)
    assert plain.draw(6).tolist() == [0, 1, -1, 4, 5, -5]
    for low, value in ((6, 1), (7, 2), (8, 3), (9, 4), (2**64 - 1, 4)):
        assert scripted(table, 20 << 1, low).draw(1).tolist() == [value]
    assert scripted(table, 30 << 1, 0).draw(1).tolist() == [5]
    assert scripted(table, 10 << 1 | 1, 4).draw(1).tolist() == [0]


def test_no_table_is_too_fine_or_too_wide():
    """Standard deviations from 2^4 to 2^16 steps."""
    for log2 in (3, 17):
        with pytest.raises(ValueError, match="2\\^4 to 2\\^16"):
            table_of("skellam", log2)


def test_a_source_refuses_to_work_after_a_fork(monkeypatch):
    """Two processes would draw the same noise."""
    noise = ShareNoise("skellam", log2=4, stream=Keystream(bytes(32)))
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(PrivacyError):
        noise.draw(1)
