"""Options of a model are the keyword arguments of its builder: their names, types, defaults and limits are read there.

A builder looks like this; the first argument describes the data, the rest are options that a run's configuration may
set. `Option` adds a sentence of help and limits; it can be left out.

    def build(schema: DataSchema, *, hidden: Annotated[int, Option(help="Units.", low=1, high=512)] = 64) -> nn.Module:
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, cast, get_args, get_origin

from torch import nn

from common.errors import ModelError

Builder = Callable[..., nn.Module]
"""`build(schema: DataSchema, **options) -> nn.Module`."""

OptionValue = bool | int | float | str
_TYPES: tuple[type, ...] = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Help and limits of one option, as `Annotated` metadata. Limits are inclusive."""

    help: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionDescription:
    """What is known of one option.

    Attributes:
        name: As written in the run's configuration.
        type: bool, int, float or str; None where a user's builder does not say.
        default: None where the option must be given.
        required: Whether the option must be given.
        help: One sentence, or empty.
        low: Least value allowed (numbers only).
        high: Greatest value allowed (numbers only).
    """

    name: str
    type: type | None
    default: OptionValue | None
    required: bool
    help: str = ""
    low: float = -math.inf
    high: float = math.inf


def read_options(build: Builder) -> tuple[OptionDescription, ...]:
    """The options that a builder takes, in its order; what follows its first parameter."""
    return tuple(_describe(p) for p in _parameters(build) if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY})


def check_options(model: str, build: Builder, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """The options as the builder wants them: whole numbers become floats where a float is declared.

    Raises:
        ModelError: An option is unknown, missing, of the wrong type, or outside its limits.
    """
    known = {o.name: o for o in read_options(build)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(build))
    for name in options:
        if name not in known and not takes_any:
            raise ModelError(f"model `{model}` has no option `{name}`", hint=nearest(name, known, none="it takes none"))
    missing = [o.name for o in known.values() if o.required and o.name not in options]
    if missing:
        raise ModelError(f"model `{model}` needs option `{missing[0]}`", hint=f"set model.options.{missing[0]}")
    return {name: _checked(model, known.get(name), name, value) for name, value in options.items()}


def nearest(name: str, known: Iterable[str], *, none: str = "there are none") -> str:
    """A hint that proposes the nearest known name, or lists them all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    return "known: " + ", ".join(f"`{n}`" for n in names) if names else none


def _parameters(build: Builder) -> list[inspect.Parameter]:
    """All parameters after the first, with annotations resolved where that is possible."""
    try:
        signature = inspect.signature(build, eval_str=True)
    except NameError:  # a user's annotation names something imported for type checkers only
        signature = inspect.signature(build)
    return list(signature.parameters.values())[1:]


def _describe(parameter: inspect.Parameter) -> OptionDescription:
    annotation, extra = parameter.annotation, Option(help="")
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        extra = next((m for m in metadata if isinstance(m, Option)), extra)
    required = parameter.default is parameter.empty
    return OptionDescription(
        name=parameter.name,
        type=annotation if annotation in _TYPES else None,
        default=None if required else parameter.default,
        required=required,
        help=extra.help,
        low=extra.low,
        high=extra.high,
    )


def _checked(model: str, option: OptionDescription | None, name: str, value: object) -> OptionValue:
    """One value, converted from int to float where a float is declared."""
    where = f"option `{name}` of model `{model}`"
    if not isinstance(value, _TYPES):
        raise ModelError(f"{where} is a {type(value).__name__}", hint="options are numbers, true or false, or names")
    if option is None or option.type is None:
        return cast("OptionValue", value)
    if option.type is float and type(value) is int:
        value = float(value)
    if type(value) is not option.type:
        raise ModelError(
            f"{where} is {value!r}, which is not {_TYPE_NAMES[option.type]}", hint=f"its default is {option.default!r}"
        )
    if isinstance(value, int | float) and not option.low <= value <= option.high:  # NaN is refused too
        raise ModelError(f"{where} is {value!r}", hint=f"it must be {limits(option)}")
    return cast("OptionValue", value)


def limits(option: OptionDescription) -> str:
    """The limits of a number in words."""
    low, high = (f"{x:,.10g}" for x in (option.low, option.high))
    if math.isinf(option.low) and math.isinf(option.high):
        return "any finite number"
    if math.isinf(option.high):
        return f"at least {low}"
    return f"at most {high}" if math.isinf(option.low) else f"between {low} and {high}"


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
