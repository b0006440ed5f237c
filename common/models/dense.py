"""`linear` and `mlp`: for tabular data, and for images taken as vectors of pixels."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated

from torch import nn

from common.models.layers import MAX_DEPTH, MAX_WIDTH, Dropout
from common.models.options import Option
from common.schema import DataSchema


def build_linear(schema: DataSchema) -> nn.Module:
    """One linear layer over all inputs: logistic regression.

    float32[n, *input_shape] to float32[n, num_classes].
    """
    return build_mlp(schema, layers=0)


def build_mlp(
    schema: DataSchema,
    *,
    hidden: Annotated[int, Option(help="Units of each hidden layer.", low=1, high=MAX_WIDTH)] = 64,
    layers: Annotated[int, Option(help="Number of hidden layers.", low=0, high=MAX_DEPTH)] = 1,
    dropout: Dropout = 0.0,
) -> nn.Module:
    """Hidden dense layers with ReLU, then the head.

    float32[n, *input_shape] to float32[n, num_classes].
    """
    features = math.prod(schema.input_shape)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if len(schema.input_shape) > 1:
        parts["flatten"] = nn.Flatten()
    for k in range(1, layers + 1):
        parts |= {f"hidden{k}": nn.Linear(features, hidden), f"relu{k}": nn.ReLU()}
        if dropout:
            parts[f"dropout{k}"] = nn.Dropout(dropout)
        features = hidden
    parts["head"] = nn.Linear(features, schema.num_classes)
    return nn.Sequential(parts)
