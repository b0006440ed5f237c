"""Noise on a grid, coin flips and choices that privacy may rest on.

Every statistical test here raises a false alarm with probability at most 1e-9.
"""

import copy
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import PrivacyError
from common.privacy import SecureNoise
from common.privacy.noise import (
    KeyedNoise,
    add_noise,
    choose,
    noise_stddev_for,
    noised,
    poisson_sample,
    rounded_sensitivity,
    sources,
)
from common.privacy.noise.discrete_gaussian import GAUSSIAN_STDDEV, GRID_STDDEV
from tests.helpers.noise import Silence

FALSE_ALARM = 1e-9
COUNT = 200_000


class Scripted:
    """A source that gives what it was told to."""

    def __init__(self, *, integers=(), words=()):
        self._integers, self._words = list(integers), list(words)

    def integers(self, count):
        taken, self._integers = self._integers[:count], self._integers[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.int32)

    def words(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)


class Silent:
    """A source that must not be asked."""

    def integers(self, count):
        raise AssertionError

    words = integers


class TestSecrecy:
    """Nobody can draw the same noise again."""

    @pytest.mark.parametrize("draw", [SecureNoise.integers, SecureNoise.words])
    def test_two_sources_differ(self, draw):
        """Each has keys of its own: long runs of equal values do not occur."""
        assert (draw(SecureNoise(), 1000) == draw(SecureNoise(), 1000)).sum() < 20

    @pytest.mark.parametrize("draw", [SecureNoise.integers, SecureNoise.words])
    def test_a_source_does_not_repeat_itself(self, draw):
        """Two draws are two parts of one stream."""
        source = SecureNoise()
        assert (draw(source, 1000) == draw(source, 1000)).sum() < 20

    def test_no_seed_reproduces_it(self):
        """Neither torch's nor numpy's generators have a part in it, and their state stays as it was."""

        def draw():
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global generator is what is at stake
            states = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
            source = SecureNoise()
            drawn = (
                add_noise([torch.zeros(50)], noise_stddev=1.0, source=source)[0],
                poisson_sample(500, rate=0.5, source=source),
                choose(np.full(50, 2**40), source),
            )
            assert torch.equal(torch.get_rng_state(), states[0])
            assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
            return drawn

        one, two = draw(), draw()
        assert not torch.equal(one[0], two[0])
        assert not torch.equal(one[1], two[1])
        assert not np.array_equal(one[2], two[2])

    def test_noise_and_masks_have_keys_of_their_own(self):
        """How much of one was drawn does not move the other, so noise may be drawn ahead."""
        keys = {"noise_key": bytes(32), "mask_key": bytes(range(32))}
        one, two = KeyedNoise(**keys), KeyedNoise(**keys)
        one.integers(1000)
        assert np.array_equal(one.words(10), two.words(10))
        assert not np.array_equal(one.integers(10), two.integers(10))

    def test_its_text_does_not_show_the_key(self):
        """A log line of it says nothing."""
        assert repr(SecureNoise()) == str(SecureNoise()) == "SecureNoise()"

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
    def test_it_cannot_be_copied_or_sent(self, duplicate):
        """Two holders of one key would draw the same noise."""
        with pytest.raises(TypeError):
            duplicate(SecureNoise())

    def test_it_refuses_to_work_after_a_fork(self):
        """Parent and child would draw the same; the child is refused, the parent goes on."""
        code = """
import os, sys
from common.errors import PrivacyError
from common.privacy import SecureNoise
source = SecureNoise()
source._noise_lock.acquire()  # as if a thread were drawing
pid = os.fork()
if pid == 0:
    for draw in (source.integers, source.words):
        try:
            draw(1)
        except PrivacyError:
            continue
        os._exit(1)
    SecureNoise().integers(1)
    os._exit(0)
source._noise_lock.release()
source.integers(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
        assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0

    def test_two_threads_never_get_the_same(self):
        """However their requests meet: together they have what one thread would have got, each part once."""
        keys = {"noise_key": bytes(32), "mask_key": bytes(32)}
        shared, alone = KeyedNoise(**keys), KeyedNoise(**keys)
        with ThreadPoolExecutor(4) as pool:
            drawn = list(pool.map(shared.integers, [5000] * 40))
        expected = [alone.integers(5000) for _ in range(40)]
        assert sorted(part.tobytes() for part in drawn) == sorted(part.tobytes() for part in expected)


class TestSensitivity:
    """What rounding to the grid costs, and how much noise makes up for it."""

    def test_it_is_the_norm_and_half_a_step_on_either_side(self):
        """C (1 + error) + grid sqrt(d), a little more, and never less."""
        value = rounded_sensitivity(2.0, summation_error=1e-3, noise_stddev=3.0, dimensions=1_300_000)
        exact = 2.0 * 1.001 + 3.0 / GRID_STDDEV * math.sqrt(1_300_000)
        assert exact < value < exact * 1.0001

    def test_it_makes_up_for_what_discreteness_takes_from_the_variance(self):
        """With no dimension to round, the continuous Gaussian that is left still has the ratio that was claimed."""
        sensitivity = rounded_sensitivity(1.0, summation_error=0.0, noise_stddev=1.0, dimensions=0)
        assert Fraction(GAUSSIAN_STDDEV) / GRID_STDDEV > 1 / Fraction(sensitivity)

    @given(
        multiplier=st.floats(0.01, 100),
        norm=st.floats(1e-6, 1e6),
        error=st.floats(0, 0.1),
        dimensions=st.integers(1, 10**8),
    )
    def test_calibrated_noise_never_falls_short(self, multiplier, norm, error, dimensions):
        """In floating point, and by less than 1e-9 too much."""
        stddev = noise_stddev_for(multiplier, norm, summation_error=error, dimensions=dimensions)
        ratio = stddev / rounded_sensitivity(norm, summation_error=error, noise_stddev=stddev, dimensions=dimensions)
        assert multiplier <= ratio < multiplier * (1 + 1e-9)

    @given(
        values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
        change=st.lists(st.floats(-1, 1), min_size=50, max_size=50),
        stddev=st.floats(0.3, 1e4),
    )
    def test_rounded_neighbours_are_no_farther_apart(self, values, change, stddev):
        """For sums of any size, in exact arithmetic on the integers to which noise is added."""
        one = np.array(values)
        two = one + np.array(change[: len(one)])
        norm = math.sqrt(sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(one, two, strict=True)))
        zeros = Scripted(integers=[0] * 2 * len(one))
        steps = [noised(v, noise_stddev=stddev, source=zeros) / (stddev / GRID_STDDEV) for v in (one, two)]
        moved = np.linalg.norm(np.rint(steps[0]) - np.rint(steps[1]))
        bound = rounded_sensitivity(norm, summation_error=0.0, noise_stddev=stddev, dimensions=len(one))
        assert moved <= bound * GRID_STDDEV / stddev * (1 + 1e-12)

    @pytest.mark.parametrize(("multiplier", "dimensions"), [(GRID_STDDEV, 1), (10.0, 10**11), (math.inf, 1)])
    def test_too_many_dimensions_are_refused(self, multiplier, dimensions):
        """Where rounding alone would ask for more noise the more there is."""
        with pytest.raises(PrivacyError, match="parameters"):
            noise_stddev_for(multiplier, 1.0, summation_error=0.0, dimensions=dimensions)

    @pytest.mark.parametrize(
        ("multiplier", "norm"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.inf), (1.0, math.nan)]
    )
    def test_no_noise_is_refused(self, multiplier, norm):
        """A plan without noise is no private plan."""
        with pytest.raises(PrivacyError):
            noise_stddev_for(multiplier, norm, summation_error=0.0, dimensions=1)


class TestNoised:
    """A sum is rounded to the grid on which its noise lies."""

    @pytest.mark.parametrize("stddev", [1e-3, 1.0, 0.7, 250.0])
    def test_its_standard_deviation_is_absolute(self, stddev):
        """Chi-square of the sum of squares; 2 % too little or too much would stand 12 standard deviations off."""
        values = noised(np.full(COUNT, 3.0), noise_stddev=stddev, source=SecureNoise()) - 3.0
        tail = FALSE_ALARM / 8
        squares = np.square(values / stddev).sum()
        assert stats.chi2.ppf(tail, COUNT) < squares < stats.chi2.isf(tail, COUNT)
        assert 0.98**2 * squares < stats.chi2.ppf(tail, COUNT)
        assert 1.02**2 * squares > stats.chi2.isf(tail, COUNT)

    def test_every_result_is_a_multiple_of_the_grid(self):
        """Whatever the sum's last bits."""
        values = np.random.default_rng(0).normal(size=10_000) * 1000
        grid = 0.7 / GRID_STDDEV
        result = noised(values, noise_stddev=0.7, source=SecureNoise())
        assert np.array_equal(np.rint(result / grid) * grid, result)

    def test_the_integers_are_exact(self):
        """The nearest multiple of the grid and the noise, at both ends of what is allowed."""
        steps = [0.0, 0.4, 0.6, -0.6, 1.5, 2.5, 2.0**44 - 1.25, -(2.0**44) + 1]
        drawn = [5, 5, 5, 5, 0, 0, 2**23, -(2**23)]
        expected = [5, 5, 6, 4, 2, 2, 2**44 - 1 + 2**23, -(2**44) + 1 - 2**23]
        for step, integer, result in zip(steps, drawn, expected, strict=True):
            value = np.array([step]) / GRID_STDDEV
            assert noised(value, noise_stddev=1.0, source=Scripted(integers=[integer])) * GRID_STDDEV == result

    def test_sums_that_differ_off_the_grid_give_the_same(self):
        """What a sum is modulo the grid does not show: equal noise makes equal results."""
        grid = 1.0 / GRID_STDDEV
        sums = [np.array([7 * grid + part * grid]) for part in (-0.49, 0.0, 0.3, 0.49)]
        assert len({noised(s, noise_stddev=1.0, source=Scripted(integers=[12]))[0] for s in sums}) == 1

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 2.0**24 + 1, -(2.0**24) - 1])
    def test_what_cannot_be_rounded_is_refused_before_drawing(self, value):
        """Not finite, or so large that the division by the grid is not exact enough."""
        with pytest.raises(PrivacyError, match="not finite"):
            noised(np.array([0.0, value]), noise_stddev=1.0, source=Silent())

    @pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf, 5e-324, 1e-200, 1e200])
    def test_no_noise_is_refused(self, stddev):
        """Also where there is nothing to add it to."""
        for values in (np.zeros(0), np.zeros(2)):
            with pytest.raises(PrivacyError, match="standard deviation"):
                noised(values, noise_stddev=stddev, source=Silent())

    def test_more_than_one_block(self, monkeypatch):
        """Blocks are joined without a seam."""
        values = np.arange(1000.0)
        whole = noised(values, noise_stddev=1.0, source=Scripted(integers=range(1000)))
        monkeypatch.setattr(sources, "_BLOCK", 64)
        assert np.array_equal(noised(values, noise_stddev=1.0, source=Scripted(integers=range(1000))), whole)


class TestAddNoise:
    """The same for the tensors of a model."""

    SHAPES = ((), (0,), (3, 4), (2, 1, 5), (70_000,))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_results_have_the_shapes_and_are_float32(self, dtype):
        """Also where there is no dimension or no element."""
        sums = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in self.SHAPES]
        results = add_noise(sums, noise_stddev=2.0, source=SecureNoise())
        assert [r.shape for r in results] == [s.shape for s in sums]
        assert all(r.dtype == torch.float32 and not r.requires_grad and r.is_contiguous() for r in results)

    def test_it_is_what_noised_gives(self):
        """One tensor after the other, rounded to float32 last; also where a tensor is not contiguous."""
        sums = [torch.randn(5, 7, dtype=torch.float64).T, torch.randn(3, dtype=torch.float64)]
        drawn = np.random.default_rng(0).integers(-(10**6), 10**6, 38)
        flat = np.concatenate([s.reshape(-1).numpy() for s in sums])
        expected = noised(flat, noise_stddev=0.3, source=Scripted(integers=drawn)).astype(np.float32)
        results = add_noise(sums, noise_stddev=0.3, source=Scripted(integers=drawn))
        assert np.array_equal(torch.cat([r.reshape(-1) for r in results]).numpy(), expected)

    def test_a_divisor_is_applied_to_what_is_released(self):
        """After rounding and noise, in float64: the integers are those without it."""
        total = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        whole, part = (add_noise([total], noise_stddev=2.0, source=Silence(), divisor=d)[0] for d in (1.0, 32.0))
        assert torch.equal(whole, part * 32)

    def test_a_device_computes_the_same(self):
        """Operation by operation what the CPU does."""
        total = torch.randn(100, 7, dtype=torch.float64) * 50
        drawn = np.random.default_rng(0).integers(-(10**6), 10**6, 700).astype(np.int32)
        (here,) = add_noise([total], noise_stddev=0.3, source=Scripted(integers=drawn))
        assert torch.equal(sources._add_on_device(total, drawn, 0.3), here)

    def test_every_coordinate_has_noise_of_its_own(self):
        """Over tensors, too: chi-square of all together, and no correlation between two."""
        results = add_noise([torch.zeros(COUNT // 2)] * 2, noise_stddev=2.0, source=SecureNoise())
        squares = float(torch.cat(results).double().square().sum()) / 4
        tail = FALSE_ALARM / 4
        assert stats.chi2.ppf(tail, COUNT) < squares < stats.chi2.isf(tail, COUNT)
        assert stats.pearsonr(*[r.numpy() for r in results]).pvalue > FALSE_ALARM / 2

    def test_the_sums_stay_as_they_were(self):
        """A result never shares memory with a sum."""
        total = torch.ones(10)
        add_noise([total], noise_stddev=1.0, source=SecureNoise())[0].zero_()
        assert torch.equal(total, torch.ones(10))

    def test_one_bad_tensor_refuses_all_before_drawing(self):
        """Nothing is released, and nothing drawn."""
        with pytest.raises(PrivacyError, match="not finite"):
            add_noise([torch.zeros(3), torch.tensor(math.nan)], noise_stddev=1.0, source=Silent())

    def test_no_tensors_need_no_noise(self):
        """A model without parameters."""
        assert add_noise([], noise_stddev=1.0, source=SecureNoise()) == []


class TestPoissonSample:
    """Each example enters by a coin of its own."""

    @pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
    def test_the_rate_is_kept(self, rate):
        """The size of the sample is binomial."""
        taken = len(poisson_sample(COUNT, rate=rate, source=SecureNoise()))
        assert stats.binomtest(taken, COUNT, rate).pvalue > FALSE_ALARM / 3

    def test_every_index_is_as_likely_and_the_size_varies(self):
        """Counts over 2000 samples of 100: chi-square over indices; and the sizes' variance is binomial."""
        source, rounds, rate = SecureNoise(), 2000, 0.3
        taken = np.zeros((rounds, 100))
        for row in taken:
            row[poisson_sample(100, rate=rate, source=source).numpy()] = 1
        variance = rounds * rate * (1 - rate)
        assert stats.chi2.sf((np.square(taken.sum(0) - rounds * rate) / variance).sum(), 100) > FALSE_ALARM / 2
        sizes = np.square(taken.sum(1) - 30) / (100 * rate * (1 - rate))
        assert FALSE_ALARM / 4 < stats.chi2.cdf(sizes.sum(), rounds) < 1 - FALSE_ALARM / 4

    @pytest.mark.parametrize("rate", [2.0**-64, 1e-3, 0.1, 1 / 3, 0.5, 1 - 2.0**-53])
    def test_the_threshold_is_the_rate_rounded_down(self, rate):
        """Words below floor(rate * 2^64) are taken, and no others: the probability is never above the rate."""
        threshold = math.floor(Fraction(rate) * 2**64)
        sample = poisson_sample(3, rate=rate, source=Scripted(words=[threshold, threshold - 1, 2**64 - 1]))
        assert sample.tolist() == [1]

    def test_at_rate_one_everybody_is_there_and_at_zero_nobody(self):
        """In order, each once; for any words."""
        assert poisson_sample(1000, rate=1.0, source=SecureNoise()).tolist() == list(range(1000))
        assert poisson_sample(2, rate=0.0, source=Scripted(words=[0, 0])).tolist() == []

    def test_a_sample_may_be_empty(self):
        """Of nobody, or of few."""
        assert poisson_sample(0, rate=0.5, source=SecureNoise()).shape == (0,)
        assert poisson_sample(3, rate=1e-12, source=SecureNoise()).dtype == torch.int64

    def test_many_rows_are_drawn_block_by_block(self):
        """Indices run on from one block to the next."""
        sample = poisson_sample(200_000, rate=1 - 2.0**-53, source=SecureNoise())
        assert sample.tolist() == list(range(200_000))

    @pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
    def test_what_is_no_rate_is_refused(self, rate):
        """Before anything is drawn."""
        with pytest.raises(PrivacyError, match="rate"):
            poisson_sample(3, rate=rate, source=Silent())


class TestChoose:
    """One member of each group."""

    def test_members_are_equally_likely(self):
        """Chi-square for several sizes at once."""
        sizes = np.tile([1, 2, 3, 7, 10], 20_000)
        chosen = choose(sizes, SecureNoise())
        assert ((chosen >= 0) & (chosen < sizes)).all()
        for size in (2, 3, 7, 10):
            assert stats.chisquare(np.bincount(chosen[sizes == size], minlength=size)).pvalue > FALSE_ALARM / 4

    def test_words_that_would_favour_some_are_drawn_again(self):
        """2^64 is 1 modulo 3 and 6 modulo 10: so many of the lowest words are left over."""
        source = Scripted(words=[0, 5, 1, 5, 0, 6])
        assert choose(np.array([3, 10, 3]), source).tolist() == [2, 6, 1]
        assert choose(np.array([2**62]), Scripted(words=[2**64 - 1])).tolist() == [2**62 - 1]

    def test_no_groups_no_choices(self):
        """An empty sample of entities."""
        assert choose(np.zeros(0, dtype=np.int64), SecureNoise()).shape == (0,)

    @pytest.mark.parametrize("size", [0, -1])
    def test_an_empty_group_is_refused(self, size):
        """Nobody is there to be chosen."""
        with pytest.raises(PrivacyError, match="members"):
            choose(np.array([3, size]), Silent())
