"""Which models can be trained with example-level privacy: those in which no example can reach another's gradient."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of all of torch's batch norms, lazy and synchronised too
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import ModelError


def check_private(model: nn.Module) -> None:
    """Refuse a model whose structure breaks example-level privacy.

    **Guarantee.** Passes only where no layer normalises over the batch or keeps running statistics of it, no trainable
    layer has a buffer (buffers leave the site neither clipped nor noised), and no parameter belongs to two layers (the
    cross terms of its per-example gradient would be missing). Code in a `forward` of your own is not read: it must not
    mix examples, and must use parameters only by calling the layers that hold them.

    Raises:
        ModelError: Names the first layer that stands in the way.
    """
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        where = f"layer `{name}` ({type(layer).__name__})" if name else f"the model itself ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm):
            raise ModelError(
                f"{where} mixes the examples of a batch, which example-level privacy forbids",
                hint="use nn.GroupNorm or nn.LayerNorm instead",
            )
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise ModelError(
                f"{where} keeps running statistics of private examples",
                hint="build it with track_running_stats=False",
            )
        if any(p.requires_grad for p in layer.parameters(recurse=False)) and any(True for _ in layer.buffers()):
            raise ModelError(
                f"{where} has trainable parameters and buffers; buffers leave the site without noise",
                hint="compute the buffer in `forward`, or move it to a layer without trainable parameters",
            )
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) in owners:
                raise ModelError(
                    f"{where} shares a parameter with {owners[id(parameter)]}",
                    hint="give each layer parameters of its own",
                )
            owners[id(parameter)] = where
