"""A model's weights out and in: all of them, or nothing changes."""

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ModelError
from common.models.weights import ModelWeights


@pytest.fixture
def model():
    """Float and integer weights, a buffer among them."""
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_weights_go_out_and_in_unchanged(model):
    """By name, shape, dtype and value, in the model's order."""
    weights = ModelWeights(model)
    arrays = weights.copy()
    assert list(arrays) == list(model.state_dict())
    changed = {name: values + 1 for name, values in arrays.items()}
    weights.load(changed)
    for name, values in weights.copy().items():
        assert values.dtype == arrays[name].dtype
        np.testing.assert_array_equal(values, changed[name])
    assert torch.equal(model[0].weight, torch.from_numpy(changed["0.weight"]))


def test_a_copy_does_not_follow_the_model(model):
    """A reply does not change while the model trains on."""
    weights = ModelWeights(model)
    before = weights.copy()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not np.array_equal(before["0.weight"], weights.copy()["0.weight"])


def test_loading_takes_values_not_memory(model):
    """Training does not write into the arrays that came, which may be read-only views of a message."""
    weights = ModelWeights(model)
    arrays = weights.copy()
    for values in arrays.values():
        values.flags.writeable = False
    weights.load(arrays)
    with torch.no_grad():
        model[0].weight.fill_(9)
    assert not (arrays["0.weight"] == 9).any()


def test_float64_is_taken_and_cast(model):
    """Some of Flower's strategies answer in float64."""
    weights = ModelWeights(model)
    arrays = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in weights.copy().items()}
    weights.load(arrays)
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.pop("1.bias"),
        lambda a: a.update(extra=np.zeros(1)),
        lambda a: a.update({"1.bias": np.zeros(3, np.float32)}),
        lambda a: a.update({"1.bias": np.zeros((1, 2), np.float32)}),
        lambda a: a.update({"1.bias": np.zeros(2, np.complex64)}),
        lambda a: a.update({"1.bias": np.array(["x", "y"])}),
        lambda a: a.update({"1.bias": np.array([None, None])}),
        lambda a: a.update({"1.num_batches_tracked": np.float32(1.5)}),
    ],
    ids=["missing", "extra", "longer", "other shape", "complex", "text", "objects", "float for integer"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(model, spoil):
    """The last array is wrong, and the first is not loaded either."""
    weights = ModelWeights(model)
    before = weights.copy()
    arrays = {name: values + 1 for name, values in before.items()}
    spoil(arrays)
    with pytest.raises(ModelError):
        weights.load(arrays)
    for name, values in weights.copy().items():
        np.testing.assert_array_equal(values, before[name])
