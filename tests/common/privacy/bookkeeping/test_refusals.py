"""Models whose per-example gradients cannot be exact are refused before anything is trained."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common.errors import PrivacyError
from common.privacy.bookkeeping import Bookkeeping


def frozen_in_part(layer, name):
    getattr(layer, name).requires_grad_(False)
    return layer


class Mixture(nn.Module):
    """A layer with a parameter of its own beside a trainable sub-layer."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x + self.token)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(3, 4), "takes time first"),
        (nn.LSTM(3, 4, proj_size=2, batch_first=True), "projects its hidden state"),
        (nn.LSTM(3, 4, num_layers=2, dropout=0.1, batch_first=True), "drops out between its layers"),
        (nn.GRU(3, 4, batch_first=True), "has no per-example gradients"),
        (nn.RNN(3, 4, batch_first=True), "has no per-example gradients"),
        (nn.EmbeddingBag(3, 4), "has no per-example gradients"),
        (nn.MultiheadAttention(4, 2, batch_first=True), "mixes parameters of its own with trainable sub-layers"),
        (Mixture(), "mixes parameters of its own with trainable sub-layers"),
        (nn.BatchNorm1d(3), "mixes the examples of a batch"),
        (nn.BatchNorm2d(3, affine=False), "mixes the examples of a batch"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "keeps running statistics"),
        (nn.Embedding(3, 4, max_norm=1.0), "shortens the vectors"),
        (nn.Embedding(3, 4, scale_grad_by_freq=True), "how often a batch names an id"),
        (nn.LazyLinear(3), "has no size yet"),
        (frozen_in_part(nn.Linear(3, 3), "bias"), "frozen in part"),
        (frozen_in_part(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0"), "frozen in part"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_without_exact_gradients_are_refused(layer, message):
    """Before anything is trained, by name, and with a way out; the model stays as it was."""
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(PrivacyError, match=f"layer `1` .*{message}") as caught:
        Bookkeeping(model)
    assert caught.value.hint
    assert "forward" not in vars(model[0])
    assert not hasattr(model[0].weight, "grad_sample")


def test_shared_parameters_are_refused():
    """A parameter that two layers use has cross terms in its norm, which nobody computes."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    with pytest.raises(PrivacyError, match=r"layer `1` \(Linear\) shares a parameter with layer `0` \(Embedding\)"):
        Bookkeeping(model)


def test_frozen_layers_are_not_refused():
    """What is not trained needs no gradients, of whatever kind it is."""
    Bookkeeping(nn.Sequential(nn.GRU(3, 4).requires_grad_(False), nn.Linear(4, 2)))


def test_parametrised_weights_are_refused():
    """A weight that is computed from parameters elsewhere has no layer whose input it multiplies."""
    with pytest.raises(PrivacyError, match="mixes parameters"):
        Bookkeeping(nn.Sequential(weight_norm(nn.Linear(3, 3))))
    model = nn.Sequential(weight_norm(nn.Linear(3, 3, bias=False)))
    Bookkeeping(model)
    with pytest.raises(PrivacyError, match="called with something other than one batch"):
        model(torch.ones(2, 3))
