"""Models by registered name: plain torch modules that every party builds alike, all fit for example-level privacy.

`build_model` is the way in; `registry` knows the built-in names and a site's own; one module a family (`cnn`, `lstm`,
`transformer`, `resnet`, `inception`, `dense`) holds the networks; `options` reads what a builder can be told; `private`
refuses what cannot be trained with example-level privacy; `export` writes a trained model for use without Coterie. Used
by the coordinator, the sites and the simulations alike. A model's `forward` takes a batch of inputs and returns logits,
float32[n, num_classes] or float32[n, length, num_classes].
"""

from common.models.export import EXPORT_FORMATS, ExportFormat, export_model
from common.models.options import Builder, Option, OptionDescription
from common.models.private import check_private
from common.models.registry import (
    ModelDescription,
    build_model,
    describe,
    initial_model,
    model_names,
    parameter_count,
)

__all__ = [
    "EXPORT_FORMATS",
    "Builder",
    "ExportFormat",
    "ModelDescription",
    "Option",
    "OptionDescription",
    "build_model",
    "check_private",
    "describe",
    "export_model",
    "initial_model",
    "model_names",
    "parameter_count",
]
