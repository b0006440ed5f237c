"""The tape: when it records, what it hands out, and what it refuses while training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from common.errors import PrivacyError
from common.privacy.bookkeeping import MAX_PHYSICAL_BATCH, Bookkeeping
from tests.common.privacy.bookkeeping.helpers import alone, assert_equal, each, loss_of, taped

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3, bias=False))


def refused(match):
    return pytest.raises(PrivacyError, match=match)


def test_the_sums_are_weighted_per_example_and_per_parameter(model):
    """One factor per example, or one per parameter and example, in the order of `model.parameters()`."""
    expected = list(alone(model, X).values())
    factors = torch.rand(5, 5, dtype=torch.float64)
    bookkeeping = Bookkeeping(model)
    assert [p.shape for p in bookkeeping.parameters] == [p.shape for p in model.parameters()]
    gradients = taped(bookkeeping, X)
    assert gradients.examples == 5
    assert gradients.squared_norms.shape == (5, 5)
    for k, (row, total, flat) in enumerate(
        zip(expected, gradients.weighted_sums(factors), gradients.weighted_sums(factors[0]), strict=True)
    ):
        torch.testing.assert_close(total, torch.einsum("i,i...", factors[k], row), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(flat, torch.einsum("i,i...", factors[0], row), rtol=1e-5, atol=1e-6)
        assert total.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2), nn.Flatten()),
    lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3)),
])  # fmt: skip
def test_an_example_with_factor_zero_contributes_exactly_nothing(make, bad):
    """Its gradient may be infinite, too large for float32 or not a number, which its norm tells."""
    torch.manual_seed(0)
    model = make()
    spoilt = X.clone()
    spoilt[2] = bad
    without = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25], dtype=torch.float64)
    results = []
    for inputs in (X, spoilt):
        own = copy.deepcopy(model)
        gradients = taped(Bookkeeping(own), inputs, lambda model, x: model(x).square().sum())
        results.append(gradients.weighted_sums(without))
    assert not gradients.squared_norms[:, 2].isfinite().all()
    assert gradients.squared_norms[:, [0, 1, 3, 4]].isfinite().all()
    for clean, found in zip(*results, strict=True):
        torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-7)


def test_an_example_with_factor_zero_does_not_change_a_bit(model):
    """Without non-finite values too, what is left out leaves no trace."""
    other = X.clone()
    other[2] *= 3.0
    factors = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25], dtype=torch.float64)
    bookkeeping = Bookkeeping(model)
    first, second = (taped(bookkeeping, x).weighted_sums(factors) for x in (X, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_physical_batches_are_collected_one_after_another(model):
    """Batches of any sizes, also empty ones, each give their own gradients; their sums add up to the whole's."""
    expected = alone(model, X)
    bookkeeping = Bookkeeping(model)
    parts = []
    for part in (X[:3], X[:0], X[3:4], X[4:]):
        gradients = taped(bookkeeping, part)
        parts.append(each(gradients, model) if len(part) else None)
        if not len(part):
            assert gradients.squared_norms.shape == (5, 0)
            sums = gradients.weighted_sums(torch.zeros(0, dtype=torch.float64))
            assert [s.shape for s in sums] == [p.shape for p in model.parameters()]
            assert not any(s.any() for s in sums)
    found = {name: torch.cat([p[name] for p in parts if p is not None]) for name in expected}
    assert_equal(found, expected)


def test_results_are_valid_until_the_next_batch(model):
    """Afterwards their memory holds other gradients, and asking for sums is refused."""
    bookkeeping = Bookkeeping(model)
    first = taped(bookkeeping, X)
    taped(bookkeeping, X)
    with refused("after the next batch"):
        first.weighted_sums(torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("evaluating", [True, False], ids=["eval", "no_grad"])
def test_evaluation_is_as_it_was(model, evaluating):
    """In evaluation mode or without gradients nothing is taped, and gradients are plain torch's."""
    expected = model(X)
    bookkeeping = Bookkeeping(model)
    taped(bookkeeping, X)
    if evaluating:
        output = model.eval()(X)
        output.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.train()
    else:
        with torch.no_grad():
            output = model(X)
    assert torch.equal(output, expected)
    assert not bookkeeping._calls


def test_training_can_follow_evaluation(model):
    """Gradients after an evaluation are those of the training batch alone."""
    expected = alone(model, X)
    bookkeeping = Bookkeeping(model)
    model.eval()(X * 3)
    with torch.no_grad():
        model.train()(X * 3)
    assert_equal(each(taped(bookkeeping, X), model), expected)


def test_detaching_leaves_the_model_as_it_was(model):
    """No attribute is left on layers or parameters, and plain training works again."""
    attributes = [set(vars(layer)) for layer in model.modules()]
    expected = model(X)
    bookkeeping = Bookkeeping(model)
    assert torch.equal(model(X), expected)
    assert all(hasattr(p, "grad_sample") for p in model.parameters())
    bookkeeping.detach()
    assert [set(vars(layer)) for layer in model.modules()] == attributes
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    loss_of(model, X).backward()
    assert all(p.grad is not None for p in model.parameters())
    Bookkeeping(model).detach()


def test_a_model_is_watched_once(model):
    """A second tape on the same model is refused until the first is taken off."""
    first = Bookkeeping(model)
    with refused("already watched"):
        Bookkeeping(model)
    first.detach()
    Bookkeeping(model)


def test_a_copied_model_is_an_ordinary_one(model):
    """A deep copy computes with its own parameters, nobody watches it, and it can be watched by itself."""
    bookkeeping = Bookkeeping(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.mul_(2.0)
    assert not torch.equal(copied(X), model(X))
    bookkeeping.discard()
    loss_of(copied, X).backward()
    assert all(p.grad is not None for p in copied.parameters())
    copied.zero_grad()
    assert_equal(each(taped(Bookkeeping(copied), X), copied), alone(copied, X))


def test_other_rows_than_examples_are_refused(model):
    """A layer that sees each example as several rows would have each row clipped by itself."""
    bookkeeping = Bookkeeping(model)
    model(X.repeat(2, 1)).sum().backward()
    with refused("other rows than there are examples") as caught:
        bookkeeping.collect(5)
    assert "first dimension" in caught.value.hint


def test_more_examples_than_the_stated_error_covers_are_refused(model):
    """Rounding grows with the number of examples in a sum; the stated bound ends at a public number."""
    with refused("a physical batch of 4097 examples"):
        Bookkeeping(model).collect(MAX_PHYSICAL_BATCH + 1)


def test_rows_are_counted_where_no_gradient_came_too(model):
    """The count is that of the forward pass."""
    bookkeeping = Bookkeeping(model)
    model(X)
    with refused("other rows"):
        bookkeeping.collect(4)


def test_a_layer_called_twice_is_refused(model):
    """Cross terms of its gradient would be missing."""
    Bookkeeping(model)
    with refused("layer `0` .* was called twice"):
        model[0](model(X).new_zeros(5, 4))


def test_recomputation_is_refused():
    """Checkpointing runs layers a second time during the backward pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    Bookkeeping(model)
    loss = checkpoint(model[1], model[0](X), use_reentrant=False).sum()
    with refused("called twice"):
        loss.backward()


def test_a_failed_step_can_be_discarded(model):
    """What was taped is forgotten; the next batch is taken as if nothing had been."""
    bookkeeping = Bookkeeping(model)
    model(X * 7)
    bookkeeping.discard()
    expected = alone(model, X)
    assert_equal(each(taped(bookkeeping, X), model), expected)


def test_a_second_backward_pass_is_refused(model):
    """Whether before or after collection: the gradients would be another pass's."""
    bookkeeping = Bookkeeping(model)
    loss = loss_of(model, X)
    loss.backward(retain_graph=True)
    with refused("more than once"):
        loss.backward(retain_graph=True)
    bookkeeping.collect(5)
    with refused("more than once"):
        loss.backward()


def test_parameters_used_outside_their_layer_are_refused(model):
    """A gradient that reaches a parameter past its layer would not be told apart by example."""
    Bookkeeping(model)
    with refused("outside of its layer's own forward pass"):
        (model(X).sum() + model[0].weight.square().sum()).backward()


def test_overwritten_inputs_are_refused(model):
    """The gradient would be made of values that the layer did not see."""
    bookkeeping = Bookkeeping(model)
    x = X.clone()
    loss_of(model, x).backward()
    x += 1.0
    with refused("overwritten"):
        bookkeeping.collect(5)


@pytest.mark.parametrize("call", [lambda layer: layer(X, None), lambda layer: layer([X]), lambda layer: layer(None)])
def test_calls_with_other_things_than_a_batch_are_refused(call):
    """A rule knows one input."""
    layer = nn.Linear(4, 2)
    layer.forward = layer.forward  # as a deep copy of a watched layer has it
    Bookkeeping(layer)
    with refused("something other than one tensor"):
        call(layer)


def test_inputs_may_have_gradients_of_their_own(model):
    """An input that requires a gradient gets it."""
    expected = torch.autograd.grad(loss_of(model, x := X.clone().requires_grad_()), x)[0]
    Bookkeeping(model)
    found = torch.autograd.grad(loss_of(model, x), x)[0]
    torch.testing.assert_close(found, expected)


def test_a_model_without_trainable_parameters_has_no_gradients():
    """Its norms and sums are empty."""
    gradients = Bookkeeping(nn.Sequential(nn.Linear(2, 2).requires_grad_(False))).collect(3)
    assert gradients.squared_norms.shape == (0, 3)
    assert gradients.weighted_sums(torch.ones(3)) == []


def test_half_precision_parameters_have_float32_norms():
    """A bfloat16 model's gradients are summed in float32 and better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).bfloat16()
    gradients = taped(Bookkeeping(model), X.bfloat16())
    assert_equal(each(gradients, model), alone(model.float(), X), relative=0.1)


def test_functions_between_layers_need_no_rule(model):
    """Whatever torch does between layers, examples flow through it as always."""

    def loss(model, x):
        return F.gelu(model[3](F.softmax(model[1](model[0](x)), dim=1))).square().sum()

    assert_equal(each(taped(Bookkeeping(model), X, loss), model), alone(model.requires_grad_(), X, loss))
