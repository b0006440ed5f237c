"""Grid and noise of a run: the multiplier is kept, bounds hold in whole numbers, sums stay in the ring."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.distributed import Mechanism, mechanism, mechanism_of
from common.privacy.distributed.mechanism import padded, rounded_bound, scaled_norm


def made(**changes):
    return mechanism_of(
        **{
            "noise": "skellam",
            "bits": 24,
            "clients": 10,
            "honest": 2,
            "clipping_norm": 1.5,
            "noise_multiplier": 1.0,
            "dimensions": 1000,
        }
        | changes
    )


def chosen(**changes):
    """A mechanism, or None where there is none."""
    try:
        return made(**changes)
    except PrivacyError:
        return None


settings_of_runs = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([16, 20, 24, 32]),
        "clients": st.integers(2, 2000),
        "honest": st.just(2),
        "clipping_norm": st.floats(1e-6, 1e6),
        "noise_multiplier": st.floats(0.05, 50),
        "dimensions": st.integers(1, 10_000_000),
    }
)


@given(settings_of_runs)
@settings(deadline=None)
def test_the_multiplier_is_kept(run):
    """Noise of the honest over the bound on a rounded update is what was asked for or more, and hardly more."""
    found = chosen(**run)
    if found is None:
        return
    assert found.noise_multiplier >= run["noise_multiplier"]
    assert found.variance >= run["noise_multiplier"] ** 2 * found.l2_squared * (1 - 1e-12)
    assert (found.l2_squared + 1) * run["noise_multiplier"] ** 2 >= found.variance * (1 - 1e-12)


@given(settings_of_runs)
@settings(deadline=None)
def test_the_bound_covers_what_rounding_gives(run):
    """An update of the clipping norm, rounded, is within the bound but for a small chance; never below its norm."""
    found = chosen(**run)
    if found is None:
        return
    norm = found.clipping_norm / found.granularity
    assert rounded_bound(norm, found.draws) <= found.l2_squared * (1 + 1e-9)
    assert norm**2 <= found.l2_squared <= 1 << 52
    assert 2 * norm >= math.sqrt(found.l2_squared) * (1 - 1e-9), "rounding costs at most as much noise again"


@given(settings_of_runs)
@settings(deadline=None)
def test_a_sum_stays_in_the_ring(run):
    """All updates in one direction and the noise of all, both as far out as a chance of 2^-20 lets them go."""
    found = chosen(**run)
    if found is None:
        return
    norm, size = found.clipping_norm / found.granularity, found.draws
    deviations = math.sqrt(2 * math.log(4 * size * 2**20))
    signal = found.clients * norm * min(1.0, deviations / math.sqrt(size))
    noise = deviations * math.sqrt(found.clients) * found.share_stddev
    assert signal + noise < 1 << found.bits - 1


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40))
def test_the_bound_on_sizes_follows_from_that_on_squares(values):
    """Whole numbers whose squares come to B have sizes that come to B at most, and to sqrt(d B) at most."""
    values = np.array(values)
    found = dataclasses.replace(made(dimensions=len(values)), l2_squared=int(values @ values))
    assert np.abs(values).sum() <= found.l1


@pytest.mark.parametrize(
    ("gamma", "beta", "expected"),
    [
        (1e-9, 0.01, 1.000000001642451),
        (1e-2, 0.01, 158.13231445360802),
        (1e-9, 0.5, 1.0000000007137142),
        (1e-2, 0.5, 158.12296930808552),
    ],
)
def test_the_norm_bound_is_the_papers(monkeypatch, gamma, beta, expected):
    """Figures of TensorFlow Federated's own test of its norm bound: norm 1, step gamma, 1e9 coordinates, beta."""
    monkeypatch.setattr(mechanism, "DEVIATIONS", math.sqrt(2 * math.log(1 / beta)))
    bound = math.sqrt(rounded_bound(1 / gamma, 10**9)) * gamma
    assert bound == pytest.approx(expected, rel=1e-7 if gamma == 1e-2 else 1e-9)


@given(st.integers(1, 1 << 40), st.integers(0, 24))
def test_the_norm_of_a_bound_is_its_inverse(bound, log2):
    """The largest norm whose rounded squares stay within a bound; where there is none it is not positive."""
    norm = scaled_norm(bound, 1 << log2)
    if norm > 0:
        assert rounded_bound(norm, 1 << log2) == pytest.approx(bound, rel=1e-9)
    else:
        assert rounded_bound(0.0, 1 << log2) >= bound * (1 - 1e-9)


def test_noise_is_for_the_fewest_honest():
    """Twice as many honest clients: each adds half the variance, in the update's own units."""
    two, four = (made(honest=honest, noise_multiplier=2.0, bits=32) for honest in (2, 4))
    absolute = [found.share_variance * found.granularity**2 for found in (two, four)]
    assert absolute[0] == pytest.approx(2 * absolute[1], rel=0.01)
    assert two.variance == 2 * two.share_variance
    assert four.variance == 4 * four.share_variance


def test_the_mechanism_is_the_same_everywhere():
    """Figures of one run, to the last bit: sites and coordinator come to the same digest."""
    found = made()
    assert (found.share_stddev, found.l2_squared, found.draws, found.l1) == (512, 524_288, 1024, 23_170)
    assert found.granularity.hex() == made().granularity.hex() == "0x1.108e47394c318p-9"
    assert found.distance == 2 * 1024 * 2.0**-100


def test_the_digest_names_every_field():
    """Two mechanisms that differ anywhere have different digests."""
    found = made()
    others = {
        "noise": "discrete-gaussian",
        "bits": 32,
        "clients": 11,
        "honest": 3,
        "clipping_norm": 1.25,
        "dimensions": 999,
        "granularity": math.nextafter(found.granularity, 1),
        "l2_squared": found.l2_squared + 1,
        "share_stddev": 1024,
    }
    assert others.keys() == {field.name for field in dataclasses.fields(Mechanism)}
    digests = {dataclasses.replace(found, **{name: value}).digest for name, value in others.items()}
    assert len(digests | {found.digest}) == len(others) + 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 16, "clients": 1000, "noise_multiplier": 0.1}, "does not fit"),
        ({"bits": 16, "dimensions": 10_000_000, "noise_multiplier": 5.0}, "too coarse"),
        ({"noise_multiplier": 1e9}, "too coarse"),
        ({"noise_multiplier": 0.0}, "no noise"),
        ({"noise_multiplier": math.nan}, "no noise"),
        ({"clipping_norm": math.inf}, "no noise"),
        ({"honest": 0}, "shared"),
        ({"honest": 11}, "shared"),
        ({"dimensions": 0}, "shared"),
    ],
)
def test_what_cannot_be_is_refused(changes, says):
    """Rings that are too small, noise that is too coarse a grid, and numbers that mean nothing."""
    with pytest.raises(PrivacyError, match=says):
        made(**changes)


def test_more_noise_never_needs_a_smaller_ring():
    """What is calibrated by halving and doubling the noise stays possible on the way up, until the grid is coarse."""
    found = [chosen(noise_multiplier=0.01 * 1.3**i, bits=20, dimensions=100_000) for i in range(30)]
    first = next(i for i, each in enumerate(found) if each)
    assert all(found[first:])
    deviations = [each.share_stddev for each in found[first:]]
    assert deviations == sorted(deviations)


def test_padding_is_to_a_power_of_two():
    """One value needs one coordinate; a power of two is not padded."""
    assert [padded(d) for d in (1, 2, 3, 4, 5, 1 << 20, (1 << 20) + 1)] == [1, 2, 4, 4, 8, 1 << 20, 1 << 21]
