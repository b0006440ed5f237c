"""`nn.LSTM`: any depth, one or two directions, any use of its outputs; the same model as in plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common.errors import PrivacyError
from common.privacy.bookkeeping import Bookkeeping
from tests.common.privacy.bookkeeping.helpers import assert_exact

INPUTS = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(3))


class Reader(nn.Module):
    """A linear layer, an LSTM, and whatever is made of its three results."""

    def __init__(self, use=lambda output, hidden, cells: output, *, below=True, state=None, **options):
        super().__init__()
        self.before = nn.Linear(3, 4) if below else nn.Identity()
        self.lstm = nn.LSTM(4 if below else 3, 6, batch_first=True, **options)
        self.use, self.state = use, state

    def forward(self, x):
        state = () if self.state is None else (tuple(s[:, : len(x)].to(x.dtype) for s in self.state),)
        output, (hidden, cells) = self.lstm(self.before(x), *state)
        return self.use(output, hidden, cells)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_gradients_are_exact(layers, bidirectional, bias, below):
    """Any depth, one or two directions, with and without biases, as first layer and above another."""
    torch.manual_seed(0)
    assert_exact(Reader(below=below, num_layers=layers, bidirectional=bidirectional, bias=bias), INPUTS)


@pytest.mark.parametrize("length", [1, 2])
def test_gradients_of_short_sequences(length):
    """At length 1 the hidden weights meet only the zero state: their gradient is zero."""
    torch.manual_seed(0)
    model = Reader()
    assert_exact(model, INPUTS[:, :length])


@pytest.mark.parametrize(
    "use",
    [
        lambda output, hidden, cells: hidden.transpose(0, 1),
        lambda output, hidden, cells: cells.transpose(0, 1),
        lambda output, hidden, cells: output.sum((1, 2)) * (hidden * cells).sum((0, 2)),
        lambda output, hidden, cells: output[:, -1],
    ],
    ids=["hidden", "cells", "all", "last output"],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_final_states_may_be_used(use, bidirectional):
    """A loss on h_n, c_n, some or all of the output has exact gradients, of every layer and direction."""
    torch.manual_seed(0)
    assert_exact(Reader(use, num_layers=2, bidirectional=bidirectional), INPUTS)


def test_a_constant_initial_state_may_be_given():
    """A state without gradient is where every layer starts, and the hidden weights' gradients know it."""
    torch.manual_seed(0)
    shared = [torch.randn(4, 1, 6).expand(4, 5, 6) for _ in range(2)]  # an own state for each example would be data
    assert_exact(Reader(state=shared, num_layers=2, bidirectional=True), INPUTS)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_predictions_and_states_are_torchs_own(layers, bidirectional):
    """All three results equal those of the unwatched layer, and so do names and values of the parameters."""
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 6, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    state = {name: value.clone() for name, value in lstm.state_dict().items()}
    output, (hidden, cells) = lstm(INPUTS)
    bookkeeping = Bookkeeping(lstm)
    found, (last_hidden, last_cells) = lstm(input=INPUTS, hx=None)
    for mine, torchs in ((found, output), (last_hidden, hidden), (last_cells, cells)):
        torch.testing.assert_close(mine, torchs)
    assert list(lstm.state_dict()) == list(state)
    bookkeeping.detach()
    assert torch.equal(lstm(INPUTS)[0], output)


def test_outputs_may_be_overwritten():
    """Working in place on the output does not reach what is kept for the gradients."""
    torch.manual_seed(0)
    assert_exact(Reader(lambda output, hidden, cells: output.mul_(2.0)), INPUTS)


def test_an_examples_row_does_not_depend_on_the_others():
    """However large another example's values are, the gradient of an example stays what it was."""
    torch.manual_seed(0)
    lstm, extreme = nn.LSTM(3, 4, batch_first=True), INPUTS.clone()
    extreme[1] = 1e30
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    sums = []
    for inputs in (INPUTS, extreme):
        own = copy.deepcopy(lstm)
        bookkeeping = Bookkeeping(own)
        own(inputs)[0].sin().sum().backward()
        sums.append(bookkeeping.collect(5).weighted_sums(keep))
    for before, after in zip(*sums, strict=True):
        torch.testing.assert_close(before, after)


def test_learnt_states_packed_and_single_sequences_are_refused():
    """What the rule does not compute is refused when it is asked for."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    Bookkeeping(lstm)
    x, state = INPUTS, (torch.ones(1, 5, 4, requires_grad=True), torch.ones(1, 5, 4))
    for call in (
        lambda: lstm(x, state),
        lambda: lstm(x, hx=state),
        lambda: lstm(x[0]),
        lambda: lstm(pack_padded_sequence(x, torch.tensor([5, 3, 2, 2, 1]), batch_first=True)),
    ):
        with pytest.raises(PrivacyError, match=r"initial state|other than one padded batch") as caught:
            call()
        assert caught.value.hint


def test_without_privacy_an_lstm_can_be_called_in_every_way():
    """While nothing is recorded the layer is torch's own."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    Bookkeeping(lstm)
    with torch.no_grad():
        lstm(INPUTS[0])
    state = (torch.ones(1, 5, 4, requires_grad=True), torch.ones(1, 5, 4))
    lstm.eval()(INPUTS, state)[0].sum().backward()
    assert state[0].grad is not None


def test_autocast_leaves_the_recurrence_in_float32():
    """Under bfloat16 autocast outputs and gradients are as exact as without."""
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True)
    expected = lstm(INPUTS)[0]
    bookkeeping = Bookkeeping(lstm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lstm(INPUTS)[0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert bookkeeping.collect(5).squared_norms.min() > 0
