"""From a file (or a scenario's name) and `--set` overrides to one validated `RunConfig`."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from common.config.settings import RunConfig
from common.errors import ConfigError

_UNSET = object()
"""What `--set key=` leaves: the setting as if no file had it."""

DP_TABLE = "dp"
"""Top-level table whose settings replace the others when `privacy.unit` is not `none`."""

Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration and where each of its values came from.

    Attributes:
        config: The validated settings.
        plain: The same without privacy: `privacy.unit = none`, nothing masked, and the `[dp]` table left out.
        origins: Dotted key to `default`, a file's name, that file's `[dp]` table, or `--set`.
        source: The name or path that was loaded.
    """

    config: RunConfig
    plain: RunConfig
    origins: Mapping[str, str]
    source: str


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a TOML file or a named scenario, apply `key=value` overrides, validate.

    Args:
        source: A path, a scenario's name, or None for the defaults.
        overrides: `dotted.key=value` strings; the value is TOML, or a plain string.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown, a value is impossible.
    """
    label, tree = _read(source)
    set_tree = _overrides(overrides)
    private_tree = tree.pop(DP_TABLE, {})
    if not isinstance(private_tree, dict):
        raise ConfigError(
            f"{label}: `dp` must be a table", hint="write it as [dp] with tables below it, as [dp.training]"
        )
    origins: dict[str, str] = {}
    merged: Tree = {}
    _merge(merged, tree, label, origins)
    if _dig(set_tree, "model", "name") not in {None, _dig(merged, "model", "name")}:
        for part in (merged, private_tree):  # options of the file's model, which another one was chosen for
            if isinstance(model := part.get("model"), dict):
                model.pop("options", None)
    plain_tree = copy.deepcopy(merged)
    unit = _dig(set_tree, "privacy", "unit") or _dig(merged, "privacy", "unit") or "none"
    _validate(private_tree, f"{label} [{DP_TABLE}]", partial=True)
    if unit != "none":
        _merge(merged, private_tree, f"{label} [{DP_TABLE}]", origins)
    _merge(merged, set_tree, "--set", origins)
    config = _validate(merged, label)
    _merge(plain_tree, set_tree, "--set", {})
    _merge(plain_tree, {"privacy": {"unit": "none", "secure_aggregation": False}}, "", {})
    for key, _ in flatten(config.model_dump(mode="json")):
        origins.setdefault(key, "default")
    return LoadedConfig(config=config, plain=_validate(plain_tree, label), origins=origins, source=label)


def parse_config(text: str) -> RunConfig:
    """A configuration from the JSON that travels in messages.

    Raises:
        ConfigError: The text is not a valid configuration.
    """
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as e:
        raise _explain(e, "the received configuration") from e


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping; model options stay one level below `model.options`."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def find_scenario(name: str) -> Traversable | None:
    """The TOML file of a scenario that an installed package contributes, or None."""
    for entry in entry_points(group="coterie.scenarios"):
        candidate = files(entry.value).joinpath(f"{name}.toml")
        if candidate.is_file():
            return candidate
    return None


def scenario_names() -> list[str]:
    """Names of all scenarios that installed packages contribute, sorted."""
    found = (f.name for entry in entry_points(group="coterie.scenarios") for f in files(entry.value).iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def _read(source: str | Path | None) -> tuple[str, Tree]:
    if source is None:
        return "defaults", {}
    path: Path | Traversable = Path(source)
    label = str(source)
    if not path.is_file():
        scenario = find_scenario(label)
        if scenario is None:
            names = scenario_names()
            near = difflib.get_close_matches(label, names, n=1)
            hint = (
                f"did you mean the scenario `{near[0]}`?" if near else f"give a TOML file or one of: {', '.join(names)}"
            )
            raise ConfigError(f"there is no file or scenario `{label}`", hint=hint)
        path = scenario
    try:
        return label, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(
            f"{label} is not valid TOML: {e}", hint="`coterie config init` writes a complete example"
        ) from e
    except OSError as e:
        raise ConfigError(f"{label} cannot be read: {e.strerror}", hint="check the path and its permissions") from e


def _overrides(overrides: Sequence[str]) -> Tree:
    tree: Tree = {}
    for item in overrides:
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item}: expected key=value", hint="for example --set rounds=5")
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            value = raw.strip() or _UNSET
        *parents, leaf = key.strip().split(".")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--set {item}: `{parent}` is a value, not a table", hint="give every setting only once"
                )
        node[leaf] = value
    return tree


def _merge(into: Tree, tree: Tree, origin: str, origins: dict[str, str], prefix: str = "") -> None:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if value is _UNSET:
            into.pop(key, None)
            origins[dotted] = "default"
        elif isinstance(value, dict):
            child = into.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(
                    f"{origin}: `{dotted}` is a value, not a table", hint="`coterie config show` lists all settings"
                )
            _merge(child, value, origin, origins, f"{dotted}.")
        else:
            into[key] = value
            origins[dotted] = origin


def _dig(tree: Tree, *keys: str) -> object:
    node: Any = tree
    for key in keys:
        if not isinstance(node, dict):
            return None
        node = node.get(key)
    return node


def _validate(tree: Tree, label: str, *, partial: bool = False) -> RunConfig:
    """Validate; a partial tree may break rules between settings, which are checked once everything is merged."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        if partial and all(error["loc"] == () for error in e.errors()):
            return RunConfig()
        raise _explain(e, label) from e


def _explain(error: ValidationError, label: str) -> ConfigError:
    """The first problem in a user's words, with the nearest known key."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if location[:2] == ["model", "options"] and len(location) > 3:
        option = ".".join(location[:3])  # what follows names the kind of value that was tried first
        kinds = "a boolean, a finite number or a name" if location[3] != "[key]" else "the name of an option"
        return ConfigError(
            f"{label}: `{option}` is not {kinds}", hint="names are letters, digits, '-' and '_', at most 64 of them"
        )
    if first["type"] == "json_invalid":
        return ConfigError(f"{label} is not valid JSON", hint="both sides must run the same version")
    dotted = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = known_keys()
        known += sorted({key.rpartition(".")[0] for key in known if "." in key})
        leaf_matches = [k for k in known if k.rsplit(".", 1)[-1] == location[-1]]
        near = leaf_matches or difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "`coterie config show` lists all settings"
        return ConfigError(f"{label}: unknown setting `{dotted}`", hint=hint)
    context = first.get("ctx", {}).get("error")
    if not location and isinstance(context, ValueError) and str(context).count("|") == 2:
        key, problem, hint = str(context).split("|")
        return ConfigError(f"{label}: `{key}` {problem}", hint=hint)
    shown = repr(first["input"])[:60]
    message = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(f"{label}: `{dotted}` = {shown}: {message}", hint=f"`coterie config show` explains `{dotted}`")


def known_keys() -> list[str]:
    """Dotted names of all settings, tables first to last."""
    return [key for key, _ in setting_fields()]


def setting_fields() -> Iterator[tuple[str, Any]]:
    """Every setting's dotted key and pydantic field, in declaration order; tables are walked, not yielded."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in model.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from walk(annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return walk(RunConfig, "")
