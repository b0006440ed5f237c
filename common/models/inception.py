"""`inception`: a small GoogLeNet for small images, with group norm.

**Source.** Szegedy et al., arXiv 1409.4842; the 5x5 branch is two 3x3 convolutions as in arXiv 1512.00567. Departures:
group norm after every convolution, four modules instead of nine, no auxiliary heads.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

import torch
from torch import Tensor, nn

from common.models.layers import Dropout, GlobalMean, Groups, group_norm, image_shape
from common.models.options import Option
from common.schema import DataSchema


def _conv(inputs: int, outputs: int, size: int, groups: int) -> nn.Sequential:
    """Convolution that keeps height and width, group norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, group_norm(outputs, groups), nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side, `width` channels each: 1x1, 3x3, 5x5, and pooling with 1x1."""

    def __init__(self, inputs: int, width: int, *, groups: int) -> None:
        super().__init__()
        self.one = _conv(inputs, width, 1, groups)
        self.three = nn.Sequential(_conv(inputs, width, 1, groups), _conv(width, width, 3, groups))
        self.five = nn.Sequential(
            _conv(inputs, width, 1, groups), _conv(width, width, 3, groups), _conv(width, width, 3, groups)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(inputs, width, 1, groups))

    def forward(self, x: Tensor) -> Tensor:
        """float32[n, inputs, h, w] to float32[n, 4 * width, h, w]."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def build_inception(
    schema: DataSchema,
    *,
    width: Annotated[int, Option(help="Channels of a branch; doubled after two modules.", low=2, high=2048)] = 16,
    groups: Groups = 8,
    dropout: Dropout = 0.0,
) -> nn.Module:
    """Stem, two modules at half and two at quarter resolution, mean over pixels, head."""
    channels, _, _ = image_shape(schema, model="inception", at_least=8)
    return nn.Sequential(
        OrderedDict(
            stem=_conv(channels, 2 * width, 3, groups),
            pool1=nn.MaxPool2d(2),
            module1=Inception(2 * width, width, groups=groups),
            module2=Inception(4 * width, width, groups=groups),
            pool2=nn.MaxPool2d(2),
            module3=Inception(4 * width, 2 * width, groups=groups),
            module4=Inception(8 * width, 2 * width, groups=groups),
            mean=GlobalMean(),
            dropout=nn.Dropout(dropout),
            head=nn.Linear(8 * width, schema.num_classes),
        )
    )
