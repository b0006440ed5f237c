"""Every layer's gradients are those of one example at a time, whatever the layer's options."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from common.privacy.bookkeeping import Bookkeeping, product
from tests.common.privacy.bookkeeping.helpers import alone, assert_equal, assert_exact, each, taped

WAYS = pytest.mark.parametrize("way", ["ghost", "kept", "instantiated twice"])


@pytest.fixture
def choose(monkeypatch):
    """Force one of the three ways to norms and sums of outer products."""

    def force(way):
        if way == "ghost":
            monkeypatch.setattr(product.Product, "_ghostly", lambda self: True)
        else:
            monkeypatch.setattr(product.Product, "_ghostly", lambda self: self.positions == 1)
            monkeypatch.setattr(product, "_KEPT", 0 if way == "instantiated twice" else 1 << 24)

    return force


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@WAYS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)], ids=["2-d", "3-d", "4-d"])
def test_linear_gradients_are_exact(shape, bias, way, choose):
    """A linear layer sums over all positions of an example, with or without bias, as first layer and above another."""
    choose(way)
    torch.manual_seed(0)
    assert_exact(nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)), drawn(*shape))


def test_one_vector_is_one_example():
    """A linear layer and a layer norm take an input without a batch as a batch of one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), drawn(4)
    bookkeeping = Bookkeeping(model)
    model(x).sin().sum().backward()
    found = bookkeeping.collect(1).weighted_sums(torch.ones(1, dtype=torch.float64))
    bookkeeping.detach()
    model(x).sin().sum().backward()
    for total, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(total.float(), p.grad)


@WAYS
def test_inputs_need_not_be_contiguous(way, choose):
    """Transposed and expanded inputs and output gradients give the same as copies of them."""
    choose(way)
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)

    def loss(model, x):
        return model(x.transpose(1, 2)).transpose(1, 2).expand(-1, -1, -1).sin().sum(2).square().sum()

    assert_exact(layer, drawn(5, 4, 3), loss)
    assert_exact(layer, drawn(5, 1, 4).expand(5, 3, 4))
    assert_exact(layer, drawn(5, 3, 4), lambda model, x: model(x).sum())  # its gradient is an expanded number


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@WAYS
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_convolution_gradients_are_exact(way, data):
    """A convolution has exact gradients for every stride, padding, dilation, number of groups and padding mode."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "ghost":
            patch.setattr(product.Product, "_ghostly", lambda self: True)
        else:
            patch.setattr(product.Product, "_ghostly", lambda self: self.positions == 1)
            patch.setattr(product, "_KEPT", 0 if way == "instantiated twice" else 1 << 24)
        groups = data.draw(st.sampled_from([1, 2, 4]))
        kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        stride = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        padding = data.draw(st.sampled_from(["valid", "same", 0, 1, (1, 0), (0, 2)]))
        layer = nn.Conv2d(
            4,
            data.draw(st.sampled_from([1, 2])) * 4,
            kernel,
            stride=1 if padding == "same" else stride,
            padding=padding,
            dilation=data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
            groups=groups,
            bias=data.draw(st.booleans()),
            padding_mode=data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        )
        assert_exact(nn.Sequential(layer, nn.Tanh()), drawn(3, 4, 6, 7))


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (3, 4, 9)), (nn.Conv2d, (3, 4, 5, 6)), (nn.Conv3d, (3, 4, 5, 4, 6))]
)
def test_convolutions_of_every_dimension_are_exact(kind, shape):
    """One, two and three dimensions, as first layer and above another, without and with the batch's dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 6, 2, padding=1), nn.Tanh(), kind(6, 2, 3, stride=2, groups=2, bias=False))
    assert_exact(model, drawn(*shape))
    bookkeeping = Bookkeeping(model)
    model(drawn(*shape)[0]).sin().sum().backward()
    assert bookkeeping.collect(1).squared_norms.min() > 0


class OwnConvolution(nn.Conv2d):
    """A subclass that changes nothing."""


class Doubled(nn.Conv2d):
    """A subclass that computes something else."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize("kind", [OwnConvolution, Doubled])
def test_subclasses_are_exact(kind):
    """A subclass follows its parent's rule only where it has left the computation alone."""
    torch.manual_seed(0)
    assert_exact(nn.Sequential(kind(2, 3, 3)), drawn(4, 2, 5, 5))


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_gradients_are_exact(padding_idx):
    """Ids named once, often, or by several examples; the padding's vector has no gradient; ids of any shape."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, padding_idx=padding_idx)
    nn.init.normal_(table.weight)
    for ids in (torch.tensor([[0, 0, 0], [2, 6, 1], [5, 1, 5]]), torch.tensor([1, 1, 3]), torch.arange(3).expand(3, 3)):
        assert_exact(nn.Sequential(table, nn.Tanh()), ids)
        assert_exact(nn.Sequential(table, nn.Tanh()), ids.int())
        assert_exact(nn.Sequential(table), ids.unsqueeze(1))
    if padding_idx is not None:
        assert each(taped(Bookkeeping(table), ids), table)["weight"][:, padding_idx].abs().sum() == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "normalised"), [((5, 4), (4,)), ((5, 3, 4), (4,)), ((5, 3, 4), (3, 4)), ((5, 2, 3, 4), (4,))]
)
def test_layer_norm_gradients_are_exact(shape, normalised, bias):
    """Over one or several dimensions, at one or several positions, with or without bias."""
    torch.manual_seed(0)
    layer = nn.LayerNorm(normalised, bias=bias)
    nn.init.normal_(layer.weight)
    assert_exact(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)), drawn(*shape))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 2)])
def test_group_norm_gradients_are_exact(shape, groups):
    """With and without pixels, in one group or several, and from memory laid out channels last."""
    torch.manual_seed(0)
    layer = nn.GroupNorm(groups, 4)
    nn.init.normal_(layer.weight)
    assert_exact(nn.Sequential(layer, nn.Tanh()), drawn(*shape))
    if len(shape) == 4:  # torch 2.13 itself crashes over channels last where the input needs no gradient
        own = nn.Sequential(layer, nn.Tanh())
        expected, x = alone(own, drawn(*shape)), drawn(*shape).to(memory_format=torch.channels_last)
        assert_equal(each(taped(Bookkeeping(own), x), own), expected)


def test_layers_that_work_in_place_are_exact():
    """An activation may overwrite the output of the layer before it, also of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True))
    assert_exact(model, drawn(5, 4))


def test_dropout_is_that_of_the_pass():
    """Gradients belong to the mask that was drawn, not to another one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)), drawn(3, 4)
    bookkeeping = Bookkeeping(model)
    torch.manual_seed(1)
    found = taped(bookkeeping, x).weighted_sums(torch.ones(3, dtype=torch.float64))
    bookkeeping.detach()
    torch.manual_seed(1)
    model(x).sin().square().sum().backward()
    for total, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(total.float(), p.grad)


def test_frozen_layers_are_passed_through():
    """A frozen layer has no gradients of its own, and hands down those of its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 3))
    assert list(alone(model, drawn(5, 4))) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert_exact(model, drawn(5, 4))


def test_what_the_loss_does_not_depend_on_has_no_gradient():
    """Layers that were not called, or whose output was not used, contribute zeros."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.uncalled = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    assert_exact(Model(), drawn(5, 4))


@pytest.fixture
def _restored():
    """Torch's settings for the precision of matrix products, as they were."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("how", ["medium", "high", "bf16"])
@pytest.mark.usefixtures("_restored")
def test_reduced_precision_elsewhere_does_not_reach_the_norms(how):
    """Whatever precision the user allows to matrix products, norms and sums are float32 and better."""
    torch.manual_seed(0)
    model, x, gradient = nn.Linear(128, 128), drawn(4, 64, 128), drawn(4, 64, 128, seed=1)
    bookkeeping = Bookkeeping(model)
    model(x).backward(gradient)
    if how == "bf16":
        torch.backends.mkldnn.matmul.fp32_precision = how
    else:
        torch.set_float32_matmul_precision(how)
    before = [backend.fp32_precision for backend in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]
    found = bookkeeping.collect(4).weighted_sums(torch.ones(4, dtype=torch.float64))
    assert [torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision] == before
    if how != "bf16":
        assert torch.get_float32_matmul_precision() == how
    expected = torch.einsum("nto,nti->oi", gradient.double(), x.double())
    assert (found[0] - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
    lambda: nn.Sequential(
        nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    ),
])  # fmt: skip
def test_autocast_gives_the_gradients_of_bfloat16(make):
    """Under bfloat16 autocast the gradients are those of one example at a time under autocast, as near as it allows."""
    torch.manual_seed(0)
    model = make()
    x = torch.randint(9, (4, 5)) if isinstance(model[0], nn.Embedding) else drawn(4, 12)

    def loss(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        return outputs.float().sin().square().sum()

    own = copy.deepcopy(model)
    gradients = taped(Bookkeeping(own), x, loss)
    assert gradients.squared_norms.dtype == torch.float64
    assert_equal(each(gradients, own), alone(model, x), relative=0.1)


def test_cross_entropy_over_positions_is_exact():
    """The usual loss of next-token models, summed over examples and positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6))

    def loss(model, x):
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")

    assert_exact(model, torch.randint(6, (4, 8)), loss)
