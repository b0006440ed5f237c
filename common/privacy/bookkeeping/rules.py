"""Which rule each layer follows, and which models are refused because no rule is exact for them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedParameter

from common.errors import PrivacyError
from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.convolution import ConvolutionCall
from common.privacy.bookkeeping.dense import DenseCall
from common.privacy.bookkeeping.embedding import EmbeddingCall
from common.privacy.bookkeeping.fallback import FallbackCall
from common.privacy.bookkeeping.lstm import LSTMCall
from common.privacy.bookkeeping.norms import GroupNormCall, LayerNormCall

_RULES: tuple[tuple[type[nn.Module], type[Call], tuple[str, ...]], ...] = (
    (nn.Linear, DenseCall, ("forward",)),
    (nn.Embedding, EmbeddingCall, ("forward",)),
    (nn.LayerNorm, LayerNormCall, ("forward",)),
    (nn.GroupNorm, GroupNormCall, ("forward",)),
    (nn.Conv1d, ConvolutionCall, ("forward", "_conv_forward")),
    (nn.Conv2d, ConvolutionCall, ("forward", "_conv_forward")),
    (nn.Conv3d, ConvolutionCall, ("forward", "_conv_forward")),
    (nn.LSTM, LSTMCall, ("forward",)),
)
"""Class, rule, and the methods that a subclass must not have changed for the rule to be its own."""


def rules_for(model: nn.Module) -> Iterator[tuple[nn.Module, str, type[Call]]]:
    """Every layer with trainable parameters of its own, what to call it in messages, and its rule.

    Raises:
        PrivacyError: A layer's gradients cannot be told apart by example, or are not known exactly.
    """
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        where = f"layer `{name or type(layer).__name__}` ({type(layer).__name__})"
        _check_mixing(layer, where)
        own = list(layer.parameters(recurse=False))
        if not any(p.requires_grad for p in own):
            continue
        if any(isinstance(p, UninitializedParameter) for p in own):
            raise PrivacyError(f"{where} has no size yet", hint="run one batch through the model first")
        if not all(p.requires_grad for p in own):
            raise PrivacyError(f"{where} is frozen in part", hint="freeze all of its parameters or none")
        for p in own:
            if id(p) in owners:
                raise PrivacyError(
                    f"{where} shares a parameter with {owners[id(p)]}: the cross terms of an example's gradient would "
                    "be missing",
                    hint="give each layer parameters of its own",
                )
            owners[id(p)] = where
        yield layer, where, _rule(layer, where)


def _rule(layer: nn.Module, where: str) -> type[Call]:
    """A rule of its own where torch's class is unchanged in what counts; else the general one."""
    if any(p.requires_grad for child in layer.children() for p in child.parameters()):
        raise PrivacyError(
            f"{where} mixes parameters of its own with trainable sub-layers: their gradients cannot be told apart by "
            "example",
            hint="put its own parameters into a layer without sub-layers; for attention use nn.Linear projections and "
            "scaled_dot_product_attention",
        )
    if isinstance(layer, nn.LSTM):
        _check_lstm(layer, where)
    elif isinstance(layer, nn.RNNBase):
        raise PrivacyError(f"{where} has no per-example gradients", hint="use nn.LSTM with batch_first=True")
    elif isinstance(layer, nn.Embedding):
        _check_embedding(layer, where)
    elif isinstance(layer, nn.EmbeddingBag):
        raise PrivacyError(f"{where} has no per-example gradients", hint="use nn.Embedding and take the mean")
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    for kind, rule, methods in _RULES:
        unchanged = all(getattr(type(layer), method, None) is getattr(kind, method) for method in methods)
        ordinary = kind is nn.LSTM or names in ({"weight"}, {"weight", "bias"})  # not, say, a weight norm's two
        if isinstance(layer, kind) and unchanged and ordinary:
            return rule
    return FallbackCall


def _check_mixing(layer: nn.Module, where: str) -> None:
    """Refuse layers in which one example reaches another, with or without parameters."""
    if isinstance(layer, _BatchNorm):
        raise PrivacyError(
            f"{where} mixes the examples of a batch, which example-level privacy forbids",
            hint="use nn.GroupNorm or nn.LayerNorm instead",
        )
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        raise PrivacyError(
            f"{where} keeps running statistics of private examples", hint="build it with track_running_stats=False"
        )


def _check_lstm(layer: nn.LSTM, where: str) -> None:
    """Refuse the variants that the rule does not compute."""
    if not layer.batch_first:
        raise PrivacyError(f"{where} takes time first", hint="build it with batch_first=True")
    if layer.proj_size:
        raise PrivacyError(f"{where} projects its hidden state", hint="build it with proj_size=0")
    if layer.dropout and layer.num_layers > 1:
        raise PrivacyError(
            f"{where} drops out between its layers, which cannot be recomputed",
            hint="build it with dropout=0 and put an nn.Dropout after it",
        )


def _check_embedding(layer: nn.Embedding, where: str) -> None:
    """Refuse tables whose vectors or gradients depend on the whole batch."""
    if layer.max_norm is not None:
        raise PrivacyError(
            f"{where} shortens the vectors that a batch names, which tells who is in it",
            hint="build it with max_norm=None",
        )
    if layer.scale_grad_by_freq:
        raise PrivacyError(
            f"{where} divides gradients by how often a batch names an id", hint="build it with scale_grad_by_freq=False"
        )
