"""A configuration as TOML: every setting with its help, as a person would write it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic_core import PydanticUndefined

from common.config.load import flatten, setting_fields
from common.config.settings import RunConfig

_WIDTH = 100
_KINDS = {
    "string": "name",
    "array": "list of names",
    "object": "table",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
}
_LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
_TABLE_HEAD = ("| setting | default | allowed | meaning |", "|---|---|---|---|")
_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m common.config.render`; a test fails when it is out of date. -->

One TOML file describes a run. It travels to every party, so it holds registered names only: no paths, no modules, no
code. A name is made of letters, digits, `-` and `_`, at most 64 of them.

- `coterie config init` writes a file with every setting explained.
- `coterie config show FILE` prints every value and where it came from.
- `--set training.learning_rate=0.05` changes one setting and wins over the file.
- What stands below `[dp]`, such as `[dp.training]`, replaces the other settings where `privacy.unit` is not `none`: one
  file describes a run with and without privacy.

An unknown setting or an impossible value is refused before anything starts. A privacy budget has no default."""


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
        value = values.get(key, _below(values, key))
        lines.append(f"# {leaf} = " if value is None else f"{leaf} = {_inline(value)}")
    return "\n".join(lines).lstrip() + "\n"


def settings_markdown() -> str:
    """`docs/configuration.md`: every setting, its default, its limits and its meaning."""
    schema = RunConfig.model_json_schema()
    lines = [_INTRODUCTION]
    for name, table in _tables("", schema, schema["$defs"]):
        about = table["description"].split("\n")[0]
        lines += [f"\n## `[{name}]`" if name else "\n## Top level", "", about, "", *_TABLE_HEAD]
        lines += [_row(leaf, setting) for leaf, setting in table["properties"].items() if "$ref" not in setting]
    lines += ["\n## Settings that contradict each other", "", "A run is refused, in these words:", ""]
    lines += [f"- `{key}` {problem}" for _, key, problem, _ in RunConfig().rules()]
    return "\n".join(lines) + "\n"


def _tables(
    name: str, table: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A table of settings and those below it, by dotted name."""
    yield name, table
    for leaf, setting in table["properties"].items():
        if "$ref" in setting:
            yield from _tables(f"{name}.{leaf}" if name else leaf, known[setting["$ref"].split("/")[-1]], known)


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


def _row(leaf: str, setting: Mapping[str, Any]) -> str:
    """One line of the document's tables."""
    default = setting.get("default")
    shown = "not set" if default is None else f"`{_inline(default)}`"
    return f"| `{leaf}` | {shown} | {_allowed(setting)} | {setting['description']} |"


def _allowed(setting: Mapping[str, Any]) -> str:
    """A setting's type and limits in words, from its JSON schema."""
    kind = next((part for part in setting.get("anyOf", []) if part["type"] != "null"), setting)
    if "enum" in kind:
        return ", ".join(f"`{choice}`" for choice in kind["enum"])
    limits = [f"{sign} {_plain(kind[word])}" for word, sign in _LIMITS.items() if word in kind]
    words = f"{_KINDS[kind['type']]} {' and '.join(limits)}".strip()
    return f"{words}, in {setting['unit']}" if "unit" in setting else words


def _plain(number: float) -> str:
    """A number as a person writes it."""
    return str(int(number)) if number == int(number) else str(number)


def _below(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The table that `flatten` took apart."""
    return {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}


def _inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_inline(item)}' for key, item in value.items())} }}" if value else "{}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH)


def _without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value is not None
    }


if __name__ == "__main__":
    sys.stdout.write(settings_markdown())
