"""A configuration as TOML: every setting with its help, as a person would write it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic_core import PydanticUndefined

from common.config.load import flatten, setting_fields
from common.config.settings import RunConfig

_WIDTH = 100


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML, without comments; settings that are not set are left out."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def documented_toml(config: RunConfig) -> str:
    """The configuration as TOML with each setting's help, default and unit above it."""
    values = dict(flatten(config.model_dump(mode="json")))
    lines: list[str] = []
    table = ""
    for key, field in setting_fields():
        parent, _, leaf = key.rpartition(".")
        if parent != table:
            table = parent
            lines += ["", f"[{table}]"]
        elif lines:
            lines.append("")
        lines += [f"# {line}" for line in _wrapped(describe(field))]
        value = values.get(key, {})
        lines.append(
            f"# {leaf} = "
            if value is None
            else tomli_w.dumps({leaf: value}).strip()
            if value != {}
            else f"# {leaf} = {{}}"
        )
    return "\n".join(lines).lstrip() + "\n"


def describe(field: Any) -> str:
    """One line for people: help, choices, unit, default."""
    extra = field.json_schema_extra or {}
    parts = [field.description]
    if choices := _choices(field.annotation):
        parts.append(f"One of: {', '.join(choices)}.")
    if "unit" in extra:
        parts.append(f"Unit: {extra['unit']}.")
    if field.default not in (PydanticUndefined, None, [], {}):
        parts.append(f"Default: {field.default!r}.".replace("True", "true").replace("False", "false"))
    return " ".join(parts)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return []


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH)


def _without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value is not None
    }
