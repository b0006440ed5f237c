"""Clip, sum, noise, divide: what leaves a step, and a checker that refutes a mechanism that is broken.

The statistical checks raise a false alarm with probability at most 1e-7 each.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import nn

from common.errors import PrivacyError
from common.privacy import PrivacyPlan, SecureNoise
from common.privacy.optimizer import PrivateOptimizer

FALSE_ALARM = 1e-7
SHAPES = ((3,), (2, 2))
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.floats(-10, 10, width=32)
ROUNDING = 1e-5
"""A norm in float32 over a bound in float32: relative."""


class Silence:
    """A noise source without noise: shows the sum that the noise would hide."""

    def normal(self, count):
        return np.zeros(count)

    def uniform(self, count):
        return np.full(count, 0.5)


class Loud(Silence):
    """Counts how often noise is drawn."""

    def __init__(self):
        self.drawn = []

    def normal(self, count):
        self.drawn.append(count)
        return np.ones(count)


def plan(**fields):
    values = {"run": "r", "noise_multiplier": 1.5, "max_grad_norm": 2.0, "sampling_rate": 0.1, "local_steps": 1}
    values |= {"expected_batch_size": 8, "participations": 1, "target_epsilon": None, "target_delta": 1e-5}
    return PrivacyPlan(**values | fields)


def make(source, *, shapes=SHAPES, kind=PrivateOptimizer, **fields):
    """An optimizer over zeros that moves each parameter by minus its gradient."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return kind(torch.optim.SGD(parameters, lr=1.0), plan=plan(**fields), source=source), parameters


def feed(optimizer, parameters, rows):
    """Hand over per-example gradients, float32[n, size], as Opacus' hooks would."""
    begin = 0
    for parameter in parameters:
        end = begin + parameter.numel()
        parameter.grad_sample = torch.from_numpy(np.array(rows[:, begin:end])).view(-1, *parameter.shape)
        begin = end
    optimizer.accumulate(len(rows))


def step(batches, *, source=None, size=7, **fields):
    """What a step over these physical batches changes, times the divisor: float64[size]."""
    optimizer, parameters = make(source or Silence(), shapes=((3,), (size - 3,)), **fields)
    for rows in batches:
        feed(optimizer, parameters, rows)
    optimizer.finish_step()
    moved = np.concatenate([p.detach().numpy().reshape(-1) for p in parameters])
    return -moved.astype(np.float64) * optimizer.expected_batch_size


def rows_of(count):
    return hnp.arrays(np.float32, st.tuples(count, st.just(7)), elements=FLOATS)


class TestSensitivity:
    """One example changes the sum by at most the bound, whatever its gradient."""

    @given(rows_of(st.just(1)), st.sampled_from([1e-3, 1.0, 50.0]))
    @example(np.full((1, 7), 3e38, np.float32), 1.0)
    @example(np.full((1, 7), 1e-45, np.float32), 1.0)
    @example(np.array([[math.inf, -math.inf, 0, 0, 0, 0, 0]], np.float32), 1.0)
    @example(np.array([[math.nan, 1, 0, 0, 0, 0, 0]], np.float32), 1.0)
    @settings(deadline=None, max_examples=150)
    def test_a_clipped_norm_never_exceeds_its_bound(self, rows, bound):
        """Huge, tiny, zero, infinite, not a number."""
        total = step([rows], max_grad_norm=bound)
        assert np.isfinite(total).all()
        assert np.linalg.norm(total) <= bound * (1 + ROUNDING)

    @given(rows_of(st.integers(1, 6)), st.data())
    @settings(deadline=None, max_examples=100)
    def test_adding_one_example_moves_the_sum_by_at_most_the_bound(self, rows, data):
        """The neighbouring relation itself: with and without any one of them."""
        out = data.draw(st.integers(0, len(rows) - 1))
        difference = step([rows]) - step([np.delete(rows, out, axis=0)])
        assert np.linalg.norm(difference) <= 2.0 + 6 * 2.0 * ROUNDING

    def test_a_short_gradient_is_left_alone_and_a_long_one_keeps_its_direction(self):
        """The norm is over all parameters together."""
        short, long = np.full((1, 7), 0.1, np.float32), np.full((1, 7), 100.0, np.float32)
        np.testing.assert_allclose(step([short]), short[0], rtol=1e-6)
        np.testing.assert_allclose(step([long]), np.full(7, 2 / math.sqrt(7)), rtol=1e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
    def test_an_example_that_is_not_finite_contributes_nothing(self, value):
        """And the others what they did without it: in Opacus it makes every parameter NaN, which tells it is there."""
        rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
        spoiled = np.insert(rows, 2, value, axis=0)
        np.testing.assert_allclose(step([spoiled]), step([rows]), rtol=1e-6)


class TestRows:
    """Clipping bounds an example only where a row is an example."""

    @pytest.mark.parametrize("rows", [3, 5, 8])
    def test_other_rows_than_examples_are_refused(self, rows):
        """A layer that folds time or patches into the batch would have each row clipped by itself."""
        optimizer, parameters = make(Silence())
        for parameter in parameters:
            parameter.grad_sample = torch.ones(rows, *parameter.shape)
        with pytest.raises(PrivacyError, match="other rows"):
            optimizer.accumulate(4)


class TestBatches:
    """A step is one, however many physical batches it took."""

    @given(rows_of(st.integers(0, 8)), st.data())
    @settings(deadline=None, max_examples=60)
    def test_physical_batches_give_the_same_sum(self, rows, data):
        """Cut anywhere, into any number of parts, empty ones too."""
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
        np.testing.assert_allclose(step(np.split(rows, cuts)), step([rows]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("batches", [0, 1, 2, 5])
    def test_noise_is_added_once_a_step(self, batches):
        """Also where there was no batch at all."""
        source = Loud()
        total = step([np.zeros((3, 7), np.float32)] * batches, source=source)
        assert source.drawn == [3, 4]
        np.testing.assert_allclose(total, np.full(7, 1.5 * 2.0), rtol=1e-6)

    @pytest.mark.parametrize("count", [0, 1, 8, 50])
    def test_the_divisor_is_public(self, count):
        """The plan's constant, whether the sample was empty or full: a count of rows would show in the result."""
        rows = np.zeros((count, 7), np.float32)
        rows[:, 0] = 1
        optimizer, parameters = make(Silence(), shapes=((3,), (4,)), expected_batch_size=8)
        feed(optimizer, parameters, rows)
        optimizer.finish_step()
        assert parameters[0].detach()[0].item() == pytest.approx(-count / 8)

    def test_nothing_of_a_step_is_left_for_the_next(self):
        """Neither sums nor gradients: each example would count twice."""
        optimizer, parameters = make(Silence())
        rows = np.ones((2, 7), np.float32)
        feed(optimizer, parameters, rows)
        optimizer.finish_step()
        first = [p.detach().clone() for p in parameters]
        optimizer.finish_step()
        assert all(torch.equal(p, before) for p, before in zip(parameters, first, strict=True))
        assert all(p.grad_sample is None and p.summed_grad is None for p in parameters)


def check_noise(kind, batches, **fields):
    """Refute a mechanism whose steps carry other noise than planned.

    The sum of squares of d independent coordinates over the planned variance is chi-square with d degrees.
    """
    size = 20_003
    values = plan(**fields)
    noise = step(batches(size), source=SecureNoise(), size=size, kind=kind, **fields)
    squares = np.square(noise / (values.noise_multiplier * values.max_grad_norm)).sum()
    assert stats.chi2.ppf(FALSE_ALARM / 2, size) < squares < stats.chi2.isf(FALSE_ALARM / 2, size)
    assert np.unique(noise).size > 0.99 * size, "each coordinate has noise of its own"


def nobody(size):
    return []


def empty(size):
    return [np.zeros((0, size), np.float32)]


def unmoved(size):
    return [np.zeros((5, size), np.float32)] * 2


class TooQuiet(PrivateOptimizer):
    """Broken on purpose: a fifth of the noise."""

    def add_noise(self):
        self.noise_multiplier /= 5
        super().add_noise()


class SkipsEmpty(PrivateOptimizer):
    """Broken on purpose: a step over nobody does not take place."""

    def finish_step(self):
        if self.params[0].summed_grad is not None:
            super().finish_step()


class Reuses(PrivateOptimizer):
    """Broken on purpose: one draw for all coordinates of a parameter."""

    def add_noise(self):
        for parameter in self.params:
            draw = float(self._source.normal(1)[0]) * self.noise_multiplier * self.max_grad_norm
            parameter.grad = parameter.summed_grad + draw


class TestNoise:
    """The noise in a step is the noise in the plan."""

    @pytest.mark.parametrize("batches", [nobody, empty, unmoved])
    @pytest.mark.parametrize("fields", [{}, {"noise_multiplier": 0.3}, {"max_grad_norm": 0.01}], ids=str)
    def test_its_standard_deviation_is_as_planned(self, batches, fields):
        """Noise multiplier times bound, on every coordinate, over full, empty and missing batches."""
        check_noise(PrivateOptimizer, batches, **fields)

    @pytest.mark.parametrize(("kind", "batches"), [(TooQuiet, unmoved), (SkipsEmpty, nobody), (Reuses, unmoved)])
    def test_the_check_refutes_a_broken_mechanism(self, kind, batches):
        """Too little noise, a skipped empty batch, and shared noise do not pass."""
        with pytest.raises(AssertionError):
            check_noise(kind, batches)

    def test_two_steps_have_different_noise(self):
        """From the same weights and examples."""
        one, two = (step(unmoved(7), source=SecureNoise()) for _ in range(2))
        assert not np.isin(one, two).any()
