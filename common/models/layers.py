"""What several models share: checks of the data, option types, group normalisation."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from common.errors import ModelError
from common.models.options import Option
from common.schema import DataSchema

# Limits keep a mistyped option from exhausting the machine of a site that only wanted to take part.
MAX_WIDTH = 16_384
MAX_DEPTH = 256

Dropout = Annotated[float, Option(help="Share of activations dropped in training.", low=0, high=0.99)]
Groups = Annotated[
    int, Option(help="Most groups of a group norm; lowered to what divides the channels.", low=1, high=MAX_WIDTH)
]


def image_shape(schema: DataSchema, *, model: str, at_least: int) -> tuple[int, int, int]:
    """Channels, height and width; raises ModelError where the image is smaller than the model needs."""
    if len(schema.input_shape) != 3:
        raise ModelError(
            f"model `{model}` needs images [channels, height, width], but an example has shape {schema.input_shape}",
            hint="choose `linear` or `mlp`, or correct the data's description",
        )
    channels, height, width = schema.input_shape
    if min(height, width) < at_least:
        raise ModelError(
            f"model `{model}` needs images of at least {at_least} x {at_least} pixels, these have {height} x {width}",
            hint="choose `linear` or `mlp`, or larger images",
        )
    return channels, height, width


def vocabulary(schema: DataSchema, *, model: str) -> int:
    """Number of token ids; raises ModelError where the data does not declare it."""
    if schema.vocabulary_size < 1 or len(schema.input_shape) != 1:
        raise ModelError(
            f"model `{model}` needs sequences of tokens, but the data declares {schema.vocabulary_size} token ids and "
            f"examples of shape {schema.input_shape}",
            hint="declare the vocabulary's size in the data's description",
        )
    return schema.vocabulary_size


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group norm with the most groups, up to `groups`, that divide the channels and leave two or more in each.

    A group of a single channel over a single pixel would have no variance. Batch norm is no alternative: it mixes
    examples, which rules out example-level privacy and suits no federation with uneven data.
    """
    fitting = (g for g in range(min(groups, channels // 2), 0, -1) if channels % g == 0)
    return nn.GroupNorm(next(fitting, 1), channels)


class GlobalMean(nn.Module):
    """float32[n, channels, height, width] to its mean over pixels, float32[n, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over height and width."""
        return x.mean(dim=(2, 3))
