"""From a registered name to a model. A run's configuration can only choose among these names; it carries no code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from common.config.settings import ModelSettings
from common.errors import CoterieError, ModelError, SiteError
from common.models.cnn import build_cnn
from common.models.dense import build_linear, build_mlp
from common.models.inception import build_inception
from common.models.lstm import build_lstm
from common.models.options import Builder, OptionDescription, OptionValue, check_options, nearest, read_options
from common.models.resnet import build_resnet
from common.models.sources import load_builder
from common.models.transformer import build_transformer
from common.schema import DataSchema, Kind
from common.site import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A builder and the kinds of data it takes."""

    build: Builder
    families: tuple[Kind, ...]


_BUILT_IN = {
    "cnn": _Entry(build=build_cnn, families=("image",)),
    "inception": _Entry(build=build_inception, families=("image",)),
    "linear": _Entry(build=build_linear, families=("tabular", "image")),
    "lstm": _Entry(build=build_lstm, families=("tokens",)),
    "mlp": _Entry(build=build_mlp, families=("tabular", "image")),
    "resnet": _Entry(build=build_resnet, families=("image",)),
    "transformer": _Entry(build=build_transformer, families=("tokens",)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """What the command line and the documentation say of a built-in model.

    Attributes:
        name: Registered name.
        families: Kinds of data that it takes.
        summary: One sentence.
        options: In the order of the builder.
    """

    name: str
    families: tuple[Kind, ...]
    summary: str
    options: tuple[OptionDescription, ...]


def describe() -> tuple[ModelDescription, ...]:
    """All built-in models, by name."""
    return tuple(
        ModelDescription(
            name=name,
            families=entry.families,
            summary=(entry.build.__doc__ or "").split("\n")[0],
            options=read_options(entry.build),
        )
        for name, entry in _BUILT_IN.items()
    )


def model_names(site: Site) -> tuple[str, ...]:
    """Names that a run may choose here: built-in ones and the site's own, sorted."""
    return tuple(sorted({*_BUILT_IN, *site.models}))


def build_model(settings: ModelSettings, schema: DataSchema, *, site: Site) -> nn.Module:
    """Build the model that a run names, in training mode, on the CPU.

    **Guarantee.** The same settings, schema and state of torch's generator give the same weights.

    Args:
        settings: Registered name and options.
        schema: What the model's inputs and targets look like.
        site: Where the site's own models are found.

    Raises:
        ModelError: The name or an option is unknown, a value is impossible, or the model does not fit the data.
        SiteError: `site.toml` names a builder that cannot be loaded.
    """
    name = settings.name
    if name in _BUILT_IN and name in site.models:
        raise SiteError(f"site.toml registers a model under the built-in name `{name}`", hint="choose another name")
    if name in _BUILT_IN:
        entry = _BUILT_IN[name]
    elif name in site.models:
        entry = _Entry(build=load_builder(name, site), families=get_args(Kind))
    else:
        raise ModelError(f"there is no model `{name}` here", hint=nearest(name, model_names(site)))
    if schema.kind not in entry.families:
        fitting = ", ".join(f"`{n}`" for n, e in _BUILT_IN.items() if schema.kind in e.families)
        raise ModelError(
            f"model `{name}` takes {' or '.join(entry.families)} data, not {schema.kind}", hint=f"choose {fitting}"
        )
    options = check_options(name, entry.build, settings.options)
    if name in _BUILT_IN:
        return entry.build(schema, **options)
    return _build_own(name, entry.build, schema, options)


def initial_model(settings: ModelSettings, schema: DataSchema, *, seed: int, site: Site) -> nn.Module:
    """The model with the weights that belong to `seed`, as `build_model`; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_model(settings, schema, site=site)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values; a parameter that is used twice counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _build_own(name: str, build: Builder, schema: DataSchema, options: dict[str, OptionValue]) -> nn.Module:
    """Run a site's own builder and try the result on two blank examples, so that a misfit shows before training."""
    try:
        model = build(schema, **options)
    except CoterieError:
        raise
    except Exception as e:
        raise ModelError(
            f"the builder of model `{name}` failed: {e!r}", hint="see docs/models.md for an example"
        ) from e
    if not isinstance(model, nn.Module):
        raise ModelError(f"the builder of model `{name}` returned {type(model).__name__}", hint="return an nn.Module")
    dtype = torch.int64 if schema.kind == "tokens" else torch.float32
    expected = (2, *(schema.input_shape if schema.per_position else ()), schema.num_classes)
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *schema.input_shape, dtype=dtype))
    except Exception as e:
        raise ModelError(
            f"model `{name}` cannot take examples of shape {schema.input_shape}: {e!r}",
            hint="build it for schema.input_shape",
        ) from e
    if not hasattr(logits, "shape") or tuple(logits.shape) != expected:
        shape = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
        raise ModelError(f"model `{name}` returns {shape} for two examples", hint=f"return logits of shape {expected}")
    return model.train()
