"""Norms are never below the true ones, and sums are as near as stated; against exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from common.privacy.bookkeeping import (
    MAX_EXAMPLES,
    SUMMATION_ERROR,
    Bookkeeping,
    product,
    rounding,
    summation_error,
)
from common.privacy.bookkeeping.dense import Gradient, outer
from common.privacy.bookkeeping.product import Workspace, weigh
from common.privacy.bookkeeping.rounding import QUICK_EXAMPLES

WAYS = pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "instantiated"])


def exact_square(inputs, gradients):
    """The squared norm of sum_t g_t a_t^T of float32[t, i] and float32[t, o], as a fraction."""
    a, g = ([[Fraction(float(x)) for x in row] for row in rows] for rows in (inputs, gradients))
    return sum(sum(g[t][k] * a[t][j] for t in range(len(a))) ** 2 for k in range(len(g[0])) for j in range(len(a[0])))


def product_of(inputs, gradients, ghost):
    found = outer(inputs, Gradient(gradients), Workspace(), "w")
    found._ghostly = lambda: ghost
    return found


def cancelling(n, t, width, *, seed, spread=1e-7):
    """Pairs of positions whose outer products all but cancel: what remains is at the edge of float32."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, t // 2, width, generator=generator)
    g = torch.randn(n, t // 2, width, generator=generator)
    return torch.cat([a, a * (1 + spread)], 1), torch.cat([g, -g], 1)


@WAYS
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    t=st.integers(1, 9),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    magnitudes=st.tuples(st.integers(-70, 15), st.integers(-70, 15), st.sampled_from([0.0, 1e-7, 1e-3, 1.0])),
)
@example(seed=0, t=8, widths=(1, 1), magnitudes=(0, 0, 0.0))
@example(seed=1, t=2, widths=(3, 3), magnitudes=(-75, -70, 1.0))
def test_norms_are_never_below_the_true_ones(ghost, seed, t, widths, magnitudes):
    """By exact fractions: random and cancelling positions, and magnitudes whose squares underflow."""
    *exponents, cancel = magnitudes
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, t, widths[0], generator=generator) * 2.0 ** exponents[0]
    gradients = torch.randn(1, t, widths[1], generator=generator) * 2.0 ** exponents[1]
    half = t // 2
    inputs[:, half : 2 * half] = inputs[:, :half] * (1.0 + cancel)
    gradients[:, half : 2 * half] = -gradients[:, :half]
    found = product_of(inputs, gradients, ghost).squared_norms()
    assert Fraction(float(found[0])) >= exact_square(inputs[0], gradients[0])


@WAYS
def test_cancelling_positions_have_norms_and_bounded_contributions(ghost):
    """Where float32 inner products give negative squares, an example still contributes C at the most."""
    inputs, gradients = cancelling(256, 64, 16, seed=0)
    grams = torch.bmm(gradients, gradients.transpose(1, 2)) * torch.bmm(inputs, inputs.transpose(1, 2))
    assert (grams.sum((1, 2)) < 0).any(), "the inputs are not hard enough"
    found = product_of(inputs, gradients, ghost)
    squares = found.squared_norms()
    true = torch.einsum("nto,nti->noi", gradients.double(), inputs.double()).flatten(1).norm(dim=1)
    assert (squares.sqrt() >= true).all()
    factors = squares.rsqrt()
    for i in range(0, 256, 16):
        one = torch.zeros(256, dtype=torch.float64)
        one[i] = factors[i]
        assert found.weighted_sum(one, how="exact").norm() <= 1.0


def test_what_instantiation_rounds_away_is_in_the_norm():
    """A sum in float32 may come out smaller than the exact one; the norm is that of the larger."""
    inputs, gradients = cancelling(256, 64, 1, seed=3)
    found = product_of(inputs, gradients, ghost=False)
    squares = found.squared_norms()
    true = torch.einsum("nto,nti->noi", gradients.double(), inputs.double()).flatten(1).norm(dim=1)
    assert (found._kept.double().flatten().abs() < true).any(), "the inputs are not hard enough"
    assert (squares.sqrt() >= true).all()


@WAYS
def test_norms_are_close_where_nothing_cancels(ghost):
    """The price of certainty is below 0.1 % of a norm for 64 random positions."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(8, 64, width, generator=generator) for width in (48, 32))
    true = torch.einsum("nto,nti->noi", gradients.double(), inputs.double()).flatten(1).norm(dim=1)
    found = product_of(inputs, gradients, ghost).squared_norms().sqrt()
    assert (found / true).max() < 1.001


def test_a_ghost_norm_is_a_share_of_its_terms_at_least():
    """What `summation_error` builds on: however well positions cancel, S / 32 remains."""
    inputs, gradients = cancelling(4, 6, 3, seed=1, spread=0.0)
    terms = (inputs.norm(dim=2).double() * gradients.norm(dim=2).double()).sum(1)
    found = product_of(inputs, gradients, ghost=True).squared_norms().sqrt()
    assert (found >= terms / rounding.CANCELLATION * (1 - 1e-6)).all()
    assert (found <= terms / rounding.CANCELLATION * (1 + 1e-6)).all()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=1200), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
@example([1e-45] * 5, 1)
@example([1e-23] * 1100, 2)
def test_sums_of_squares_are_never_below_the_true_ones(values, copies):
    """Of any length, at any magnitude: rows of gradients, and all of an example however it lies in memory."""
    rows = torch.tensor([values] * copies, dtype=torch.float32)
    true = sum(Fraction(v) ** 2 for v in rows[0].tolist())
    for found in (
        rounding.squares_above(rows),
        rounding.sizes_above(rows).square(),
        rounding.sizes_above(rows.unsqueeze(0), 1).square(),
        rounding.sizes_above(rows.unsqueeze(1).transpose(1, 2)).square(),
    ):
        assert found.shape == (copies,)
        assert all(x == float("inf") or Fraction(x) * (1 + Fraction(1, 2**50)) >= true for x in found.tolist())


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(-70, 10))
@settings(max_examples=50, deadline=None)
def test_bias_norms_are_never_below_the_true_ones(seed, t, exponent):
    """Sums over positions that all but cancel."""
    gradients = torch.randn(1, t, 3, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    gradients[:, t // 2 : 2 * (t // 2)] = -gradients[:, : t // 2] * (1 + 1e-7)
    found = Gradient(gradients)
    found.part(0, 1)
    _, squares = found.summed()
    true = sum(sum(Fraction(x) for x in column) ** 2 for column in gradients[0].t().tolist())
    assert Fraction(float(squares[0])) >= true


def test_gamma_is_highams():
    """It is n u / (1 - n u), never below it, and infinite beyond its range."""
    for n in (1, 80, 10_000):
        true = Fraction(n, 2**24) / (1 - Fraction(n, 2**24))
        assert true <= Fraction(rounding.gamma(n, torch.float32)) <= true * Fraction(1_000_001, 1_000_000)
    assert rounding.gamma(2**24, torch.float32) == float("inf")


def test_the_stated_summation_error():
    """It grows with the examples; the constant is that of the most, about a tenth of a percent of C."""
    assert summation_error(1) < summation_error(1000) < SUMMATION_ERROR == summation_error(MAX_EXAMPLES)
    assert SUMMATION_ERROR < 1.2e-3


@pytest.mark.parametrize("how", ["exact", "quick"])
@pytest.mark.parametrize("ghost", [True, False])
def test_sums_are_as_near_as_stated(ghost, how):
    """Clipped sums of cancelling gradients, float64 against exact fractions of what each example contributes."""
    n = 12
    inputs, gradients = cancelling(n, 8, 2, seed=2)
    found = product_of(inputs, gradients, ghost)
    factors = found.squared_norms().rsqrt()
    total = found.weighted_sum(factors, how=how)
    # what is added: instantiated float32 gradients, or the exact outer products
    parts = found._kept.view(n, 2, 2) if found._kept is not None else None
    for k in range(2):
        for j in range(2):
            exact = sum(
                Fraction(float(factors[i]))
                * (
                    Fraction(float(parts[i, k, j]))
                    if parts is not None
                    else sum(Fraction(float(gradients[i, t, k])) * Fraction(float(inputs[i, t, j])) for t in range(8))
                )
                for i in range(n)
            )
            assert abs(Fraction(float(total[k, j])) - exact) <= Fraction(summation_error(n)) / 4


@pytest.mark.parametrize(("how", "count"), [("exact", 1000), ("quick", QUICK_EXAMPLES)])
def test_removing_one_example_changes_a_sum_by_its_contribution(how, count):
    """Neighbouring samples' sums differ by at most C and the stated error, here with C = 1."""
    torch.manual_seed(0)
    rows = torch.randn(count, 700)
    factors = rounding.squares_above(rows).rsqrt()
    whole = weigh(rows, factors, how=how)
    exact = factors @ rows.double()
    assert (whole - exact).norm() <= summation_error(count) / 2
    for i in (0, count // 2, count - 1):
        keep = torch.arange(count) != i
        assert (whole - weigh(rows[keep], factors[keep], how=how)).norm() <= 1.0 + summation_error(count)


@pytest.mark.parametrize(("first", "examples", "quick"), [(True, 40, True), (False, 40, False), (True, 257, False)])
def test_only_so_many_examples_of_a_step_are_added_up_quickly(first, examples, quick, monkeypatch):
    """Those of its first physical batch, if it is small: the bound on their error is a constant."""
    seen = []
    monkeypatch.setattr(product, "_weigh_quickly", lambda rows, factors, total: seen.append(len(rows)) or total.zero_())
    layer = nn.Linear(3, 2)
    bookkeeping = Bookkeeping(layer)
    layer(torch.randn(examples, 4, 3)).sum().backward()
    batch = bookkeeping.collect(examples)
    batch.weighted_sums(torch.ones(examples, dtype=torch.float64), first=first)
    assert bool(seen) is quick


def test_overflow_is_infinite():
    """A gradient whose norm float32 cannot hold has an infinite norm, not a small one."""
    layer = nn.Linear(2, 2)
    bookkeeping = Bookkeeping(layer)
    layer(torch.tensor([[1e25, 1e25], [1.0, 1.0]])).sum().backward()
    squares = bookkeeping.collect(2).squared_norms
    assert squares[0, 0] == float("inf")
    assert squares[:, 1].isfinite().all()


def test_the_workspace_is_kept_and_grows():
    """Memory is taken again while it suffices."""
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.take("a", 10, like)
    assert workspace.take("a", 5, like).data_ptr() == first.data_ptr()
    assert len(workspace.take("a", 20, like)) == 20
    assert workspace.take("a", 5, like.double()).dtype == torch.float64
    assert workspace.take("b", 5, like).data_ptr() != workspace.take("a", 5, like).data_ptr()


def test_the_cheaper_way_is_taken():
    """Few positions: ghost norms; many, or small matrices: instantiation; a vocabulary's is not instantiated."""

    def ghostly(rows, positions, inputs, outputs):
        return product.Product(
            rows=rows, positions=positions, inputs=inputs, outputs=outputs, block=None, magnitude=None,
            like=torch.empty(0), workspace=Workspace(), key="w",
        )._ghostly()  # fmt: skip

    assert ghostly(64, 1, 1600, 10)
    assert ghostly(64, 16, 4608, 512)
    assert not ghostly(64, 121, 288, 64)
    assert not ghostly(32, 80, 128, 512)
    assert ghostly(32, 64, 512, 50_000)
