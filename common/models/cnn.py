"""`cnn`: two convolutions with max-pooling, for small images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from torch import nn

from common.models.layers import MAX_WIDTH, Dropout, image_shape
from common.models.options import Option
from common.schema import DataSchema


def build_cnn(
    schema: DataSchema,
    *,
    hidden: Annotated[int, Option(help="Units of a dense layer before the head; 0: none.", low=0, high=MAX_WIDTH)] = 0,
    dropout: Dropout = 0.0,
) -> nn.Module:
    """3x3 convolutions to 32 and 64 channels, each with ReLU and 2x2 max-pooling, then the head.

    float32[n, channels, height, width] to float32[n, num_classes]; 34,826 parameters for 28x28x1 and ten classes.
    """
    channels, height, width = image_shape(schema, model="cnn", at_least=10)
    features = 64 * _pooled(_pooled(height)) * _pooled(_pooled(width))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 32, 3), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
    )  # fmt: skip
    if hidden:
        layers |= {"hidden": nn.Linear(features, hidden), "relu3": nn.ReLU()}
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["head"] = nn.Linear(hidden or features, schema.num_classes)
    return nn.Sequential(layers)


def _pooled(side: int) -> int:
    """Side of an image after a 3x3 convolution without padding and a 2x2 pooling."""
    return (side - 2) // 2
