"""What can be stacked: models whose every layer treats each example by itself, and settings that are known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import RunConfig
from common.models.inception import Inception
from common.models.layers import GlobalMean
from common.models.resnet import ResidualBlock
from common.models.transformer import Attention, Block, TokenTransformer
from simulations.stacking.dense import ordinary, read_chain

_PLAIN: frozenset[type[nn.Module]] = frozenset({
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm,
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    GlobalMean, ResidualBlock, Inception, Attention, Block,
})  # fmt: skip
"""Layers without state, in which no example reaches another: rows that pad a batch change nothing."""


def why_not(model: nn.Module, config: RunConfig) -> str | None:
    """Why clients of this model and run cannot be stacked, as half a sentence ("layer `lstm` is recurrent"), or None.

    Looks at the model's layers and at the run's training and privacy settings; what a strategy or an engine needs is
    for the caller to know.
    """
    reason = _settings(config) or _model(model)
    if reason is not None or read_chain(model) is not None:
        return reason
    if config.privacy.unit == "example":
        return "with privacy only chains of dense layers and ReLU are stacked"
    if config.training.optimizer == "adamw":  # such as attention's key bias: no client would get what it gets alone
        return "AdamW makes whole steps of rounding errors in gradients; only chains of dense layers have none"
    return None


def _settings(config: RunConfig) -> str | None:
    if config.training.precision != "float32":
        return f"training.precision is {config.training.precision}"
    if config.privacy.unit == "client":
        return "with privacy.unit = 'client' each client's update is clipped by itself"
    if config.privacy.secure_aggregation:
        return "secure aggregation masks each client's update"
    if config.privacy.unit == "example" and config.privacy.clipping == "adaptive":
        return "adaptive clipping keeps a norm for each client"
    return None


def _model(model: nn.Module) -> str | None:
    if not any(p.requires_grad for p in model.parameters()):
        return "the model has nothing to train"
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return "the model has parameters other than float32"
    for name, layer in model.named_modules():
        if (reason := _layer(layer, f"layer `{name}`" if name else "the model")) is not None:
            return reason
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(model.parameters())):
        return "two of the model's layers share parameters"
    return None


def _layer(layer: nn.Module, where: str) -> str | None:
    kind = type(layer)
    if not ordinary(layer):
        return f"{where} has hooks or a forward pass of its own"
    for bad, fault in _FAULTS:
        if bad(layer):
            return f"{where} ({kind.__name__}) {fault}"
    if kind in _PLAIN:
        return f"{where} drops units out" if isinstance(layer, Attention) and layer.rate else None
    if kind in _CONDITIONS:
        return next((f"{where} {fault}" for holds, fault in _CONDITIONS[kind] if not holds(layer)), None)
    return f"{where} ({kind.__name__}) has code that is not known to treat examples apart"


_FAULTS: Sequence[tuple[Callable[[nn.Module], bool], str]] = (
    (lambda layer: isinstance(layer, nn.RNNBase), "is recurrent, which is slower in a stack"),
    (lambda layer: isinstance(layer, _BatchNorm), "mixes the examples of a batch"),
    # a second epoch would see what the first one left
    (lambda layer: getattr(layer, "inplace", False) and type(layer) is not nn.ReLU, "works in place"),
)

_CONDITIONS: Mapping[type[nn.Module], Sequence[tuple[Callable[[Any], bool], str]]] = {
    nn.Dropout: [(lambda layer: not layer.p, "drops units out")],
    nn.Flatten: [(lambda layer: layer.start_dim > 0, "flattens examples into one another")],
    nn.Embedding: [
        (
            lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse,
            "changes with what a batch looks up",
        )
    ],
    TokenTransformer: [(lambda layer: not layer.checkpointing, "recomputes its blocks (model.options.checkpointing)")],
}
"""Layers that are stacked only where something holds, and what to say where it does not."""
