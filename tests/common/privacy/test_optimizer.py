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

from common.privacy import SecureNoise
from common.privacy.noise import GRID_STDDEV
from common.privacy.optimizer import PrivateOptimizer
from tests.helpers.noise import Loud, Silence
from tests.helpers.plans import example_plan

FALSE_ALARM = 1e-7
SHAPES = ((3,), (2, 2))
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.floats(-10, 10, width=32)
ROUNDING = 1e-5
"""A norm in float32 over a bound in float32: relative."""


class Rows:
    """Per-example gradients that a test hands over, as book-keeping does after a backward pass."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.rows = torch.zeros((0, sum(p.numel() for p in parameters)))

    def collect(self, examples):
        rows, self.examples = self.rows[:examples].double(), examples
        self.parts = rows.split([p.numel() for p in self.parameters], dim=1)
        return self

    @property
    def squared_norms(self):
        return torch.stack([part.square().sum(1) for part in self.parts])

    def weighted_sums(self, factors, *, first=False):
        factors = factors.expand(len(self.parts), self.examples)
        kept = [part.masked_fill(factor[:, None] == 0, 0.0) for part, factor in zip(self.parts, factors, strict=True)]
        return [(factor @ part).view(p.shape) for factor, part, p in zip(factors, kept, self.parameters, strict=True)]


def make(source, *, shapes=SHAPES, kind=PrivateOptimizer, clipping_norm=None, **fields):
    """An optimizer over zeros that moves each parameter by minus its gradient."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    rows = Rows(parameters)
    chosen = example_plan(**{"clipping_norm": 2.0, "dimensions": sum(p.numel() for p in parameters)} | fields)
    sgd = torch.optim.SGD(parameters, lr=1.0)
    return kind(sgd, bookkeeping=rows, plan=chosen, source=source, clipping_norm=clipping_norm), rows


def feed(optimizer, taped, rows):
    """Hand over per-example gradients, float32[n, size]."""
    taped.rows = torch.from_numpy(np.array(rows))
    optimizer.accumulate(len(rows))


def step(batches, *, source=None, size=7, **fields):
    """What a step over these physical batches changes, times the divisor: float64[size]."""
    optimizer, taped = make(source or Silence(), shapes=((3,), (size - 3,)), **fields)
    for rows in batches:
        feed(optimizer, taped, rows)
    optimizer.finish_step()
    moved = np.concatenate([p.detach().numpy().reshape(-1) for p in taped.parameters])
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
        total = step([rows], clipping_norm=bound)
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
        np.testing.assert_allclose(step([short]), short[0], atol=2e-5)  # the grid
        np.testing.assert_allclose(step([long]), np.full(7, 2 / math.sqrt(7)), rtol=1e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_an_example_that_is_not_finite_contributes_nothing(self, value):
        """And the others what they did without it: in Opacus it makes every parameter NaN, which tells it is there."""
        rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
        spoiled = np.insert(rows, 2, value, axis=0)
        np.testing.assert_allclose(step([spoiled]), step([rows]), rtol=1e-6)


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
        source = Loud(1000)
        total = step([np.zeros((3, 7), np.float32)] * batches, source=source)
        assert sum(source.drawn) == 7
        np.testing.assert_allclose(total, np.full(7, 1.5 * 2.0 / GRID_STDDEV * 1000), rtol=1e-2)

    @pytest.mark.parametrize("count", [0, 1, 8, 50])
    def test_the_divisor_is_public(self, count):
        """The plan's constant, whether the sample was empty or full: a count of rows would show in the result."""
        rows = np.zeros((count, 7), np.float32)
        rows[:, 0] = 1
        optimizer, taped = make(Silence(), shapes=((3,), (4,)), denominator=8)
        feed(optimizer, taped, rows)
        optimizer.finish_step()
        assert taped.parameters[0].detach()[0].item() == pytest.approx(-count / 8, abs=1e-5)

    def test_nothing_of_a_step_is_left_for_the_next(self):
        """Neither sums nor gradients: each example would count twice."""
        optimizer, taped = make(Silence())
        rows = np.ones((2, 7), np.float32)
        feed(optimizer, taped, rows)
        optimizer.finish_step()
        first = [p.detach().clone() for p in taped.parameters]
        optimizer.finish_step()
        assert all(torch.equal(p, before) for p, before in zip(taped.parameters, first, strict=True))
        assert all(p.summed_grad is None for p in taped.parameters)

    def test_the_sum_is_rounded_to_the_grid_of_its_noise(self):
        """Between the points of the grid nothing of the sum shows."""
        rows = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
        chosen = example_plan(clipping_norm=2.0, dimensions=7, denominator=1)
        grid = chosen.noise_stddev / GRID_STDDEV
        integers = step([rows], source=SecureNoise(), denominator=1) / grid
        np.testing.assert_allclose(integers, np.rint(integers), atol=np.abs(integers).max() * 2**-23)

    def test_noise_grows_with_an_adapting_norm(self):
        """The sensitivity does."""
        sums = [step([], source=Loud(1000), clipping="adaptive", clipping_norm=norm) for norm in (2.0, 6.0)]
        np.testing.assert_allclose(sums[1], 3 * sums[0], rtol=1e-6)


def check_noise(kind, batches, **fields):
    """Refute a mechanism whose steps carry other noise than planned.

    The sum of squares of d independent coordinates over the planned variance is chi-square with d degrees.
    """
    size = 100_003
    values = {"noise_multiplier": 1.5, "clipping_norm": 2.0, "dimensions": size} | fields
    noise = step(batches(size), source=SecureNoise(), size=size, kind=kind, **values)
    squares = np.square(noise / example_plan(**values).noise_stddev).sum()
    assert stats.chi2.ppf(FALSE_ALARM / 2, size) < squares < stats.chi2.isf(FALSE_ALARM / 2, size)
    assert np.unique(noise).size > 0.8 * size, "each coordinate has noise of its own"


def nobody(size):
    return []


def empty(size):
    return [np.zeros((0, size), np.float32)]


def unmoved(size):
    return [np.zeros((5, size), np.float32)] * 2


class TooQuiet(PrivateOptimizer):
    """Broken on purpose: a fifth of the noise."""

    def add_noise(self):
        self._relative_noise /= 5
        super().add_noise()


class SkipsEmpty(PrivateOptimizer):
    """Broken on purpose: a step over nobody does not take place."""

    def finish_step(self):
        if self.params[0].summed_grad is not None:
            super().finish_step()


class Reuses(PrivateOptimizer):
    """Broken on purpose: one draw for all coordinates of a parameter."""

    def add_noise(self):
        super().add_noise()
        for parameter in self.params:
            parameter.grad.fill_(parameter.grad.flatten()[0])


class TestNoise:
    """The noise in a step is the noise in the plan."""

    @pytest.mark.parametrize("batches", [nobody, empty, unmoved])
    @pytest.mark.parametrize("fields", [{}, {"noise_multiplier": 0.3}, {"clipping_norm": 0.01}], ids=str)
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


def test_only_a_step_s_first_batch_may_be_added_up_quickly():
    """The ledger's sensitivity holds for so many examples of a step, not of each batch."""
    optimizer, taped = make(Silence())
    firsts, sums = [], taped.weighted_sums
    taped.weighted_sums = lambda factors, *, first: firsts.append(first) or sums(factors)
    for batches in (2, 1):
        for _ in range(batches):
            feed(optimizer, taped, np.zeros((3, 7), np.float32))
        optimizer.finish_step()
    assert firsts == [True, False, True]
