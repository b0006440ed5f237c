"""How much an example may move a step's sum, whatever its gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.privacy.clipping import (
    LARGEST_NORM,
    SMALLEST_NORM,
    AdaptiveClipper,
    FlatClipper,
    PerLayerClipper,
    adapted,
    make_clipper,
)
from tests.helpers.noise import Silence

SQUARES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(0, 5)),
    elements=st.floats(0, 1e30) | st.sampled_from([0.0, math.inf, math.nan, 1e-320, 1e308]),
)
KINDS = ("flat", "per-layer", "adaptive")


def clipper(kind, norm=2.0, **changes):
    fields = {"denominator": 4, "target_quantile": 0.5, "learning_rate": 0.2, "count_noise_stddev": 1.0}
    return make_clipper(kind, norm=norm, **fields | changes)


@pytest.mark.parametrize("kind", KINDS)
@given(squares=SQUARES, norm=st.sampled_from([1e-6, 0.3, 1.0, 1e6]))
@settings(deadline=None, max_examples=100)
def test_no_contribution_is_longer_than_the_norm(kind, squares, norm):
    """Huge, tiny, zero, infinite, not a number; over all parameters together."""
    factors = clipper(kind, norm).factors(torch.from_numpy(squares))
    factors = factors.expand(squares.shape).numpy()
    assert ((factors >= 0) & (factors <= 1)).all()
    finite = np.isfinite(squares).all(0)
    contributed = np.sqrt(np.where(finite, squares, 0)) * factors
    assert (np.sqrt(np.square(contributed / norm).sum(0)) <= 1 + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_anywhere_counts_nowhere(kind, value):
    """Not even in the parameters where it is finite."""
    squares = torch.tensor([[0.01, value], [0.01, 0.01]], dtype=torch.float64)
    factors = clipper(kind).factors(squares).expand(2, 2)
    assert factors[:, 1].tolist() == [0, 0]
    assert factors[:, 0].tolist() == [1, 1]


def test_flat_clipping_looks_at_the_whole_gradient():
    """3 and 4 make 5."""
    assert FlatClipper(1.0).factors(torch.tensor([[9.0], [16.0]], dtype=torch.float64)).tolist() == [0.2]


def test_per_layer_clipping_gives_each_parameter_an_equal_share():
    """Four parameters, norm 2: each may contribute 1."""
    squares = torch.tensor([[4.0], [0.25], [1.0], [100.0]], dtype=torch.float64)
    assert PerLayerClipper(2.0).factors(squares).flatten().tolist() == [0.5, 1.0, 1.0, 0.1]


class TestAdaptive:
    """The norm follows a quantile of the norms, by a noised count."""

    def test_it_moves_towards_the_quantile(self):
        """All within: down. None within: up."""
        short, long = (torch.full((1, 4), value, dtype=torch.float64) for value in (0.01, 1e4))
        for squares, grows in ((short, False), (long, True)):
            one = clipper("adaptive")
            one.factors(squares)
            one.step_finished(Silence())
            assert (one.norm > 2.0) is grows
            assert one.norm == pytest.approx(2.0 * math.exp(0.2 * (0.5 if grows else -0.5)))

    def test_it_finds_the_median(self):
        """From far away, over steps of a hundred norms between 1 and 3."""
        squares = torch.linspace(1, 3, 101, dtype=torch.float64).square()[None]
        one = clipper("adaptive", norm=50.0, denominator=101)
        for _ in range(200):
            one.factors(squares)
            one.step_finished(Silence())
        assert one.norm == pytest.approx(2.0, rel=0.02)

    @pytest.mark.parametrize("count", [0, 3, 400])
    def test_the_divisor_is_public(self, count):
        """A sample of another size moves the norm otherwise, but the count is never divided by that size."""
        one = clipper("adaptive", denominator=4)
        one.factors(torch.zeros((1, count), dtype=torch.float64))
        one.step_finished(Silence())
        share = count / 2 / 4 + 0.5
        assert one.norm == adapted(2.0, share_within=share, target_quantile=0.5, learning_rate=0.2)

    def test_one_example_moves_the_count_by_one_half(self):
        """Within or not: what is released has sensitivity 1/2."""
        counts = []
        for squares in ([], [0.0], [1e9], [math.inf]):
            one = clipper("adaptive", denominator=1, learning_rate=1.0)
            one.factors(torch.tensor([squares], dtype=torch.float64))
            one.step_finished(Silence())
            counts.append(-math.log(one.norm / 2.0))  # share - quantile = what was released
        assert np.abs(np.array(counts[1:]) - counts[0]).tolist() == pytest.approx([0.5, 0.5, 0.5])

    def test_physical_batches_make_one_count(self):
        """A step over two parts is one step."""
        whole, parts = clipper("adaptive"), clipper("adaptive")
        squares = torch.tensor([[1.0, 9.0, 0.5, 100.0, 2.0]], dtype=torch.float64)
        whole.factors(squares)
        parts.factors(squares[:, :2])
        parts.factors(squares[:, 2:])
        whole.step_finished(Silence())
        parts.step_finished(Silence())
        assert whole.norm == parts.norm

    @given(st.floats(SMALLEST_NORM, LARGEST_NORM), st.floats(-1e12, 1e12), st.floats(0.01, 2))
    def test_no_noise_drives_it_out_of_bounds(self, norm, share, rate):
        """Or by more than a factor e in one step."""
        after = adapted(norm, share_within=share, target_quantile=0.5, learning_rate=rate)
        assert SMALLEST_NORM <= after <= LARGEST_NORM
        assert norm / math.e * 0.999 <= after <= norm * math.e * 1.001 or after in {SMALLEST_NORM, LARGEST_NORM}

    def test_it_cannot_be_made_without_noise(self):
        """A count without noise would tell of a single example."""
        with pytest.raises(ValueError, match="noise"):
            clipper("adaptive", count_noise_stddev=None)
        assert isinstance(clipper("adaptive"), AdaptiveClipper)
