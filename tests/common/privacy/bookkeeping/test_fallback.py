"""Layers without a rule of their own are run again, example by example."""

import pytest
import torch
from torch import nn

from common.errors import PrivacyError
from common.privacy.bookkeeping import Bookkeeping
from tests.common.privacy.bookkeeping.helpers import assert_exact, taped

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


class Scale(nn.Module):
    """A parameter, a constant argument, a frozen sub-layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))
        self.inner = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x, power=1):
        return self.inner(x * self.scale**power) + self.shift


class OutputLSTM(nn.LSTM):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x)[0]


class Centred(nn.Module):
    """Mixes examples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x - x.mean(0)) * self.scale


class Noisy(Centred):
    """Draws random numbers."""

    def forward(self, x):
        return nn.functional.dropout(x * self.scale, 0.5)


class Pair(Centred):
    """Has two outputs."""

    def forward(self, x):
        return x * self.scale, x


class Turned(Centred):
    """Loses the batch's dimension."""

    def forward(self, x):
        return (x * self.scale).sum(0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Scale(), (5, 3)),
        (nn.PReLU(), (5, 3)),
        (nn.RMSNorm(3), (5, 2, 3)),
        (nn.InstanceNorm2d(2, affine=True), (5, 2, 3, 3)),
        (nn.ConvTranspose2d(2, 3, 2), (5, 2, 3, 3)),
        (nn.Conv2d(2, 3, 2, groups=1, padding_mode="circular", padding=1), (5, 2, 3, 3)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_unknown_layers_are_exact(layer, shape, first):
    """By automatic differentiation under torch.vmap, as first layer and above another."""
    torch.manual_seed(0)
    below = nn.Identity() if first else nn.Linear(shape[-1], shape[-1])
    assert_exact(nn.Sequential(below, layer, nn.Tanh()), torch.randn(*shape))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_subclass_is_exact(layers):
    """Torch has no rule for its recurrence under vmap; examples are run one by one."""
    torch.manual_seed(0)
    assert_exact(nn.Sequential(OutputLSTM(3, 4, num_layers=layers, batch_first=True)), torch.randn(3, 6, 3))


def test_constant_arguments_are_passed_on():
    """Numbers beside the batch reach the layer, by position or by name."""
    torch.manual_seed(0)
    for call in (lambda model, x: model(x, 3).sin().sum(), lambda model, x: model(x, power=3).sin().sum()):
        assert_exact(Scale(), X, call)


def test_outputs_may_be_overwritten():
    """An activation in place after the layer does not confuse the check of its output."""
    torch.manual_seed(0)
    assert_exact(nn.Sequential(Scale(), nn.ReLU(inplace=True)), X)


@pytest.mark.parametrize("kind", [Centred, Noisy])
def test_layers_that_are_not_example_by_example_are_refused(kind):
    """An output that an example alone does not give means that its gradient is not its own."""
    torch.manual_seed(0)
    with pytest.raises(PrivacyError, match="treats an example in a batch otherwise than alone") as caught:
        taped(Bookkeeping(nn.Sequential(kind())), X)
    assert "Dropout" in caught.value.hint


@pytest.mark.parametrize("kind", [Pair, Turned])
def test_other_outputs_are_refused(kind):
    """Only one tensor [n, ...] has a gradient for each example."""
    model = nn.Sequential(kind())
    Bookkeeping(model)
    with pytest.raises(PrivacyError, match="output is not one tensor") as caught:
        model(X)
    assert caught.value.hint


@pytest.mark.parametrize("call", [lambda m: m(X, X), lambda m: m(x=X), lambda m: m(torch.ones(()))])
def test_other_inputs_are_refused(call):
    """A second tensor might be anything."""
    layer = Scale()
    Bookkeeping(layer)
    with pytest.raises(PrivacyError, match="something other than one batch"):
        call(layer)


def test_not_finite_outputs_are_not_taken_for_mixing():
    """An example that overflows is not refused, which would tell that it is there, but has a norm that says so."""
    x = X.clone()
    x[1] = float("inf")
    gradients = taped(Bookkeeping(nn.Sequential(Scale())), x)
    assert not gradients.squared_norms[0, 1].isfinite()
    assert gradients.squared_norms[0, [0, 2, 3, 4]].isfinite().all()


def test_an_unknown_first_layer_with_an_empty_batch():
    """No rows, no gradients."""
    assert taped(Bookkeeping(nn.Sequential(nn.ConvTranspose1d(2, 3, 2))), torch.zeros(0, 2, 5)).squared_norms.shape == (
        2,
        0,
    )
