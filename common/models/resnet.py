"""`resnet`: residual network for small images, with group norm.

**Source.** He et al., arXiv 1512.03385, in the form usual for 32x32 images: a 3x3 stem without pooling. Departure:
group norm (Wu and He, arXiv 1803.08494) instead of batch norm.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from torch import Tensor, nn

from common.models.layers import MAX_DEPTH, GlobalMean, Groups, group_norm, image_shape
from common.models.options import Option
from common.schema import DataSchema


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input; a 1x1 convolution adapts the input where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = group_norm(outputs, groups)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = group_norm(outputs, groups)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), group_norm(outputs, groups)
            )

    def forward(self, x: Tensor) -> Tensor:
        """float32[n, inputs, h, w] to float32[n, outputs, h / stride, w / stride], rounded up."""
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        z: Tensor = self.relu2(y + self.shortcut(x))
        return z


def build_resnet(
    schema: DataSchema,
    *,
    width: Annotated[int, Option(help="Channels of the first stage; doubled at each next one.", low=2, high=2048)] = 64,
    blocks: Annotated[int, Option(help="Residual blocks in each of the four stages.", low=1, high=MAX_DEPTH)] = 2,
    groups: Groups = 8,
) -> nn.Module:
    """Four stages at full, half, quarter and eighth resolution: ResNet-18 with the default options."""
    channels, _, _ = image_shape(schema, model="resnet", at_least=8)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=group_norm(width, groups), relu=nn.ReLU()
    )
    inputs = width
    for stage in range(4):
        outputs = width << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers[f"stage{stage + 1}_{block + 1}"] = ResidualBlock(inputs, outputs, stride=stride, groups=groups)
            inputs = outputs
    layers |= {"mean": GlobalMean(), "head": nn.Linear(inputs, schema.num_classes)}
    return nn.Sequential(layers)
