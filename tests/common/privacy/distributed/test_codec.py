"""A noised sum from update to mean: what a client adds is bounded, and the noise is what was planned.

Every statistical test here raises a false alarm with probability at most 1e-9.
"""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import NonFiniteError, PrivacyError
from common.privacy.distributed import DistributedSum, codec, mechanism_of
from common.privacy.distributed.codec import MOST_TRIES
from common.privacy.distributed.sampler import ShareNoise
from common.privacy.noise.keystream import Keystream

FALSE_ALARM = 1e-9
NOISES = ("skellam", "discrete-gaussian")
ROTATION = bytes(range(32))


def made(dimensions, *, noise="skellam", bits=32, clients=5, honest=2, norm=1.0, multiplier=1.0):
    mechanism = mechanism_of(
        noise,
        bits=bits,
        clients=clients,
        honest=honest,
        clipping_norm=norm,
        noise_multiplier=multiplier,
        dimensions=dimensions,
    )
    return DistributedSum(mechanism=mechanism, dimensions=dimensions, rotation=ROTATION)


def seed_of(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()


def encode(summed, update, seed):
    return summed.encode(np.asarray(update, np.float64), weight=1.0, metrics={}, seed=seed)


def without_noise(summed, vector, seed):
    """What a client added but for its noise: the noise is drawn once more."""
    log2 = summed.mechanism.share_stddev.bit_length() - 1
    noise = ShareNoise(summed.mechanism.noise, log2=log2, stream=codec._stream(seed, b"noise")).draw(summed.size)
    return vector.view(np.int32).astype(np.int64) - noise


def decoded(summed, updates, *label):
    """The mean that comes of these updates, through a sum modulo the ring."""
    total = np.zeros(summed.size, np.uint32)
    for i, update in enumerate(updates):
        total += encode(summed, update, seed_of(label, i))
    return summed.decode(total & np.uint32((1 << summed.bits) - 1), len(updates))


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    st.floats(0.3, 20),
    st.sampled_from([16, 24]),
    st.binary(min_size=32, max_size=32),
)
@settings(deadline=None, max_examples=120)
def test_what_a_client_adds_is_within_the_bound(update, multiplier, bits, seed):
    """Squares and sizes, noise apart, come to what the accounting says at most, whatever the update is."""
    try:
        summed = made(len(update), multiplier=multiplier, bits=bits)
    except PrivacyError:
        return
    numbers = without_noise(summed, encode(summed, update, seed), seed)
    assert int(numbers @ numbers) <= summed.mechanism.l2_squared
    assert int(np.abs(numbers).sum()) <= summed.mechanism.l1


def test_an_update_that_rounds_too_long_is_rounded_again():
    """A bound that every other rounding keeps is kept; so is one that none does, by rounding towards zero."""
    summed = made(256, bits=16, multiplier=8.0, clients=3)
    update = np.ones(256) / 16
    square = (summed.mechanism.clipping_norm / summed.mechanism.granularity) ** 2
    for bound in (int(square), int(square) - 2500):
        tight = dataclasses.replace(summed, mechanism=dataclasses.replace(summed.mechanism, l2_squared=bound))
        for i in range(10):
            numbers = without_noise(tight, encode(tight, update, seed_of(i)), seed_of(i))
            assert square - 5000 < int(numbers @ numbers) <= bound


def test_a_bound_below_the_norm_is_refused():
    """Nothing is sent rather than something too long."""
    summed = made(256)
    broken = dataclasses.replace(summed, mechanism=dataclasses.replace(summed.mechanism, l2_squared=100))
    with pytest.raises(PrivacyError, match="longer than its bound"):
        encode(broken, np.ones(256), bytes(32))


@pytest.mark.parametrize(("dimensions", "bits"), [(16, 32), (4096, 16)])
def test_rounding_is_hardly_ever_done_again(dimensions, bits):
    """At most with the chance that is stated, for the vector that rounding lengthens most."""
    summed = made(dimensions, bits=bits, multiplier=2.0)
    norm = summed.mechanism.clipping_norm / summed.mechanism.granularity
    values = np.full(dimensions, math.floor(norm / math.sqrt(dimensions) - 0.5) + 0.5)
    stream, room = Keystream(bytes(32)), np.empty(dimensions, np.int32)
    again = sum(codec._round(values, room, stream) > summed.mechanism.l2_squared for _ in range(2000))
    assert stats.binom.sf(again - 1, 2000, math.exp(-12.5)) > FALSE_ALARM
    assert MOST_TRIES >= 16


@pytest.mark.parametrize("noise", NOISES)
def test_of_nothing_comes_nothing_but_noise(noise):
    """An update of zero, the neighbour of every other one, adds zero in every coordinate."""
    summed = made(100, noise=noise)
    assert not without_noise(summed, encode(summed, np.zeros(100), bytes(32)), bytes(32)).any()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("survivors", [2, 3, 5])
def test_the_noise_is_what_was_planned(noise, survivors):
    """With the fewest honest survivors the sum's noise has the planned variance, with more of them more."""
    d = 1 << 16
    summed = made(d, noise=noise, multiplier=1.5)
    update = np.sin(np.arange(d)) * 0.9 / math.sqrt(d / 2)
    mean = decoded(summed, [update] * survivors, noise, survivors)
    noises = (mean.update - update) * survivors / summed.mechanism.granularity
    planned = summed.mechanism.variance * survivors / summed.mechanism.honest
    if survivors == summed.mechanism.honest:
        assert planned == pytest.approx((1.5**2) * summed.mechanism.l2_squared, rel=1e-5)
    threshold = stats.norm.isf(FALSE_ALARM / 4)
    assert abs(float(noises @ noises) / planned / d - 1) < threshold * math.sqrt(2.001 / d)
    assert abs(noises.mean()) < threshold * math.sqrt(planned / d)
    assert mean.weight == survivors
    assert mean.metrics == {}


def test_the_mean_is_right():
    """What the sum says along the update itself is its length, up to noise; nothing is lost to rounding or clipping."""
    d = 1 << 14
    summed = made(d, multiplier=0.5, clients=10)
    directions = [np.roll(np.sign(np.sin(np.arange(d) * 0.37)), i) / math.sqrt(d) for i in range(10)]
    exact = np.mean(directions, axis=0)
    mean = decoded(summed, directions, "mean").update
    stddev = math.sqrt(10 * summed.mechanism.share_variance) * summed.mechanism.granularity / 10
    along = float((mean - exact) @ exact) / float(np.linalg.norm(exact))
    assert abs(along) < stats.norm.isf(FALSE_ALARM / 2) * stddev


@pytest.mark.parametrize("noise", NOISES)
def test_a_hundred_thousand_values_lose_next_to_nothing_to_the_grid(noise):
    """The error of the mean is that of ten clients' Gaussian noise on the clipped sum, within two hundredths."""
    d, clients = 100_000, 10
    summed = made(d, noise=noise, bits=20, clients=clients)
    updates = [np.cos(np.arange(d) * (i + 1)) / math.sqrt(d / 2) for i in range(clients)]
    error = decoded(summed, updates, noise).update - np.mean(updates, axis=0)
    ideal = math.sqrt(clients / 2) / clients
    assert float(np.sqrt((error**2).mean())) == pytest.approx(ideal, rel=0.02)


def test_nothing_wraps_in_a_tight_ring():
    """Sixteen bits, all clients alike, in one coordinate: no coordinate of the sum is off by a whole ring."""
    d = 5000
    summed = made(d, bits=16, clients=20, multiplier=0.5)
    update = np.zeros(d)
    update[17] = 1.0
    error = decoded(summed, [update] * 20, "tight").update - update
    stddev = math.sqrt(20 * (summed.mechanism.share_variance + 0.25)) * summed.mechanism.granularity / 20
    assert np.abs(error).max() < stats.norm.isf(FALSE_ALARM / d) * stddev


def test_longer_updates_are_clipped():
    """An update of ten times the norm is the same update at the norm."""
    d = 64
    summed = made(d, norm=2.0)
    update = np.linspace(-1, 1, d)
    short = update * 2 / np.linalg.norm(update)
    seed = bytes(32)
    long, clipped = (without_noise(summed, encode(summed, each, seed), seed) for each in (update * 10, short))
    assert np.abs(long - clipped).max() <= 1


def test_noise_follows_its_seed_alone():
    """Another seed, another noise; a client that is asked twice draws a new one."""
    summed = made(1000)
    first = encode(summed, np.zeros(1000), bytes(32))
    assert np.array_equal(first, encode(summed, np.zeros(1000), bytes(32)))
    assert (first != encode(summed, np.zeros(1000), seed_of(1))).mean() > 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_refused(bad):
    """Nothing is sent of an update without a norm."""
    with pytest.raises(NonFiniteError):
        encode(made(3), [0.0, bad, 0.0], bytes(32))


def test_what_does_not_fit_is_refused():
    """Another length, a seed that is too short, more survivors than there are clients, or none; too many values."""
    summed = made(3)
    for update, seed in ((np.zeros(4), bytes(32)), (np.zeros(3), bytes(31))):
        with pytest.raises(ValueError, match="3 values"):
            encode(summed, update, seed)
    for total, survivors in ((np.zeros(4), 0), (np.zeros(4), 6), (np.zeros(5), 2)):
        with pytest.raises(PrivacyError):
            summed.decode(total.astype(np.uint32), survivors)
    with pytest.raises(PrivacyError, match="does not cover"):
        dataclasses.replace(summed, dimensions=4)


def test_fewer_values_than_planned_are_padded():
    """The plan counts all values of a model; a sum may be about fewer, over as many coordinates."""
    summed = dataclasses.replace(made(1000), dimensions=3)
    assert summed.size == 1024
    assert decoded(summed, [np.zeros(3)] * 2).update.shape == (3,)


def test_the_digest_names_everything():
    """Mechanism, length and rotation."""
    summed = made(100)
    others = [
        dataclasses.replace(summed, dimensions=99),
        dataclasses.replace(summed, rotation=bytes(32)),
        dataclasses.replace(summed, mechanism=dataclasses.replace(summed.mechanism, clients=6)),
    ]
    assert len({each.digest for each in [summed, *others]}) == 4
