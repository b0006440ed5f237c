"""What tests of book-keeping share: plain torch, one example at a time, to hold it against."""

from __future__ import annotations

import copy

import torch

from common.privacy.bookkeeping import Bookkeeping


def loss_of(model, inputs):
    """Sum over examples of something in which no gradient is zero or constant."""
    return model(inputs).sin().square().sum()


def alone(model, inputs, loss=loss_of):
    """By parameter name, float64[n, ...]: each example by itself, in float64, by plain autograd, on a copy."""
    model = copy.deepcopy(model).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    names, parameters = zip(*[(k, p) for k, p in model.named_parameters() if p.requires_grad], strict=True)
    rows = [
        torch.autograd.grad(loss(model, inputs[i : i + 1]), parameters, materialize_grads=True)
        for i in range(len(inputs))
    ]
    return {name: torch.stack(gradients) for name, gradients in zip(names, zip(*rows, strict=True), strict=True)}


def taped(bookkeeping, inputs, loss=loss_of):
    """What a pass over these inputs leaves."""
    total = loss(bookkeeping.model, inputs)
    total.backward()
    assert all(p.grad is None for p in bookkeeping.parameters)
    return bookkeeping.collect(len(inputs))


def each(gradients, model):
    """By parameter name, float64[n, ...]: the weighted sums in which one example has factor 1 and the others 0."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    rows = [gradients.weighted_sums(row) for row in torch.eye(gradients.examples, dtype=torch.float64)]
    return {name: torch.stack(found) for name, found in zip(names, zip(*rows, strict=True), strict=True)}


def assert_equal(found, expected, *, relative=1e-5):
    """Every parameter's gradients, example by example, by their distance relative to their length."""
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert found[name].shape == rows.shape, name
        distance, length = (x.flatten(1).norm(dim=1) for x in (found[name] - rows, rows))
        assert (distance <= relative * length + 1e-12).all(), f"{name}: {(distance / length).max():.1e}"


def assert_exact(model, inputs, loss=loss_of, *, relative=1e-5):
    """Gradients are those of one example at a time; norms are theirs, or a little more."""
    expected = alone(model, inputs, loss)
    for dtype, within in ((torch.float32, relative), (torch.float64, 1e-10)):
        own = copy.deepcopy(model).to(dtype)
        bookkeeping = Bookkeeping(own)
        gradients = taped(bookkeeping, inputs.to(dtype) if inputs.is_floating_point() else inputs, loss)
        found = each(gradients, own)
        assert_equal(found, expected, relative=within)
        for squares, rows, sums in zip(gradients.squared_norms, expected.values(), found.values(), strict=True):
            true, added = (x.flatten(1).square().sum(1) for x in (rows, sums))
            assert (squares >= added).all()
            assert (squares >= true * (1 - 3 * within)).all()
            assert (squares <= true * 1.01 + 1e-20).all()
        bookkeeping.detach()
