"""Noise and coin flips that privacy may rest on.

Every statistical test here raises a false alarm with probability at most 1e-7.
"""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from common.errors import PrivacyError
from common.privacy import SecureNoise
from common.privacy.noise import normal_like, poisson_sample

FALSE_ALARM = 1e-7
COUNT = 200_000


class TestDistribution:
    """What is drawn is what the theory assumes."""

    def test_normal_variates_are_standard_normal(self):
        """Kolmogorov-Smirnov against the normal distribution."""
        assert stats.kstest(SecureNoise().normal(COUNT), "norm").pvalue > FALSE_ALARM

    def test_uniform_variates_are_uniform(self):
        """Kolmogorov-Smirnov against the uniform distribution."""
        assert stats.kstest(SecureNoise().uniform(COUNT), "uniform").pvalue > FALSE_ALARM

    def test_the_variance_is_one(self):
        """The sum of squares is chi-square: what an epsilon is computed from."""
        values = SecureNoise().normal(COUNT)
        tail = FALSE_ALARM / 2
        assert stats.chi2.ppf(tail, COUNT) < np.square(values).sum() < stats.chi2.isf(tail, COUNT)

    def test_the_tails_are_there(self):
        """As many variates beyond four standard deviations as there should be."""
        beyond = int((np.abs(SecureNoise().normal(COUNT)) > 4).sum())
        assert stats.binomtest(beyond, COUNT, 2 * stats.norm.sf(4)).pvalue > FALSE_ALARM

    @pytest.mark.parametrize("lag", [1, COUNT // 2])
    def test_variates_do_not_depend_on_one_another(self, lag):
        """Neither neighbours nor the two of a Box-Muller pair; nor their sizes."""
        values = SecureNoise().normal(COUNT)
        for x in (values, np.abs(values)):
            assert stats.pearsonr(x[:-lag], x[lag:]).pvalue > FALSE_ALARM / 2

    def test_uniform_variates_never_are_zero_or_one(self, monkeypatch):
        """For the smallest and the largest words that the cipher can give: a logarithm, or a sure coin, needs it."""
        source = SecureNoise()
        for byte in (b"\x00", b"\xff"):
            monkeypatch.setattr(source, "_bytes", lambda count, byte=byte: bytearray(byte * count))
            assert 0 < source.uniform(1)[0] < 1
            assert np.isfinite(source.normal(2)).all()

    @pytest.mark.parametrize("count", [0, 1, 2, 3, (1 << 15) + 1, (1 << 16) + 3])
    def test_any_number_can_be_drawn(self, count):
        """None, odd numbers, and more than one block of the cipher."""
        source = SecureNoise()
        assert source.normal(count).shape == source.uniform(count).shape == (count,)
        assert len(np.unique(source.uniform(count))) == count


class TestSecrecy:
    """Nobody can draw the same noise again."""

    def test_two_sources_differ(self):
        """Each has a key of its own."""
        assert not np.isin(SecureNoise().uniform(1000), SecureNoise().uniform(1000)).any()

    def test_a_source_does_not_repeat_itself(self):
        """Two draws are two parts of one stream."""
        source = SecureNoise()
        assert not np.isin(source.uniform(1000), source.uniform(1000)).any()

    def test_no_seed_reproduces_it(self):
        """Neither torch's nor numpy's generators have a part in it, and their state stays as it was."""

        def draw():
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global generator is what is at stake
            states = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
            source = SecureNoise()
            drawn = (
                normal_like(torch.zeros(50), stddev=1.0, source=source),
                poisson_sample(500, rate=0.5, source=source),
            )
            assert torch.equal(torch.get_rng_state(), states[0])
            assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
            return drawn

        one, two = draw(), draw()
        assert not torch.isin(one[0], two[0]).any()
        assert not torch.equal(one[1], two[1])

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
pid = os.fork()
if pid == 0:
    try:
        source.normal(1)
    except PrivacyError:
        SecureNoise().normal(1)
        os._exit(0)
    os._exit(1)
source.normal(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_a_foreign_process_is_refused(self, monkeypatch):
        """Whatever is asked of it."""
        source = SecureNoise()
        monkeypatch.setattr("os.getpid", lambda: -1)
        for draw in (source.normal, source.uniform):
            with pytest.raises(PrivacyError):
                draw(1)


class TestNormalLike:
    """Noise for a tensor."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_has_the_tensor_s_shape_and_kind(self, dtype):
        """Also where there is no dimension or no element."""
        for shape in ((), (0,), (3, 4)):
            noise = normal_like(torch.zeros(shape, dtype=dtype), stddev=2.0, source=SecureNoise())
            assert (noise.shape, noise.dtype) == (torch.Size(shape), dtype)

    @pytest.mark.parametrize("stddev", [1e-3, 1.0, 250.0])
    def test_its_standard_deviation_is_absolute(self, stddev):
        """Kolmogorov-Smirnov against the scaled normal distribution."""
        noise = normal_like(torch.zeros(COUNT), stddev=stddev, source=SecureNoise())
        assert stats.kstest(noise.numpy(), "norm", args=(0, stddev)).pvalue > FALSE_ALARM


class TestPoissonSample:
    """Each example enters by a coin of its own."""

    @pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
    def test_the_rate_is_kept(self, rate):
        """The size of the sample is binomial."""
        taken = len(poisson_sample(COUNT, rate=rate, source=SecureNoise()))
        assert stats.binomtest(taken, COUNT, rate).pvalue > FALSE_ALARM

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

    def test_at_rate_one_everybody_is_there(self):
        """In order, each once."""
        assert poisson_sample(1000, rate=1.0, source=SecureNoise()).tolist() == list(range(1000))

    def test_a_sample_may_be_empty(self):
        """Of nobody, or of few."""
        assert poisson_sample(0, rate=0.5, source=SecureNoise()).shape == (0,)
        assert poisson_sample(3, rate=1e-12, source=SecureNoise()).dtype == torch.int64
