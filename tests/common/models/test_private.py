"""Models that cannot be trained with example-level privacy are refused by the layer's name."""

import pytest
import torch
from torch import nn

from common.errors import ModelError
from common.models import check_private


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(3))


def tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), r"`1` \(BatchNorm2d\) mixes the examples"),
        (nn.Sequential(nn.BatchNorm1d(2, affine=False)), r"`0` \(BatchNorm1d\) mixes the examples"),
        (nn.Sequential(nn.LazyBatchNorm1d()), "mixes the examples"),
        (nn.SyncBatchNorm(2), "the model itself .SyncBatchNorm. mixes the examples"),
        (
            nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)),
            "`0` .* keeps running statistics",
        ),
        (nn.Sequential(nn.Linear(3, 3), Scaled()), "`1` .Scaled. has trainable parameters and buffers"),
        (tied(), "`2` .Linear. shares a parameter with layer `0`"),
    ],
)
def test_a_layer_that_breaks_privacy_is_named(model, message):
    """Batch statistics, running statistics, buffers beside parameters, and tied weights."""
    with pytest.raises(ModelError, match=message) as caught:
        check_private(model)
    assert caught.value.hint


def test_harmless_layers_pass():
    """Norms of one example, frozen layers with buffers, buffers without parameters, one layer at two places."""
    frozen = Scaled()
    frozen.weight.requires_grad_(False)
    bare = nn.Module()
    bare.register_buffer("mean", torch.zeros(3))
    linear = nn.Linear(3, 3)
    check_private(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3, affine=True), frozen, bare))
    check_private(nn.Sequential(linear, nn.ReLU(), linear))
