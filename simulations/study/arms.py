"""From `--vary KEY=A,B` to arms: every combination of the values, and the configuration of each of their runs."""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tomli_w

from common.config import RunConfig, load_config
from common.config.load import LoadedConfig, known_keys
from common.errors import ConfigError

MAX_RUNS = 1000
"""More runs than this are more likely a slip than a wish."""

REPEATED = ("model", "cohort", "training", "devices")
"""Seeds that move from one repeat to the next; the data's seed does on request alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Varied:
    """One varied setting.

    Attributes:
        key: Its dotted key.
        values: Its values as `--set` takes them, in the order given.
    """

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of an arm.

    Attributes:
        folder: Below the study's folder.
        repeat: From 1.
        config: The run's configuration.
        plain: The same without privacy.
    """

    folder: str
    repeat: int
    config: RunConfig
    plain: RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedArm:
    """One combination of the varied settings.

    Attributes:
        label: For people: its values.
        settings: Value by key, as `--set` takes them.
        runs: One a repeat.
    """

    label: str
    settings: Mapping[str, str]
    runs: tuple[PlannedRun, ...]


def parse_vary(words: Sequence[str]) -> tuple[Varied, ...]:
    """What `--vary` says.

    The values are separated by commas; each is TOML, or a plain string. Values that hold commas themselves are written
    as the elements of a TOML list: `data.sites=["a", "b"], ["c"]`.

    Raises:
        ConfigError: No `=`, fewer than two values, a value or a key twice.
    """
    found: dict[str, Varied] = {}
    for item in words:
        key, equals, raw = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise ConfigError(f"--vary {item}: expected key=value,value", hint="for example --vary rounds=5,10")
        values = _values(raw)
        if len(values) < 2:
            raise ConfigError(
                f"--vary {item}: one value is nothing to compare", hint=f"use --set {item}, or add others: {item},..."
            )
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise ConfigError(f"--vary {item}: {twice} stands there twice", hint="name every value once")
        if key in found:
            raise ConfigError(f"--vary {key} is given twice", hint="list all values behind one --vary")
        found[key] = Varied(key=key, values=values)
    if not found:
        raise ConfigError("nothing is varied", hint="for example --vary strategy.name=fedavg,fedprox")
    return tuple(found.values())


def _values(raw: str) -> tuple[str, ...]:
    try:
        listed = tomllib.loads(f"v = [{raw}]")["v"]
    except tomllib.TOMLDecodeError:
        listed = [_value(part) for part in raw.split(",")]  # plain strings among them: fedavg,fedprox
    return tuple(_text(value) for value in listed if value != "")


def _value(part: str) -> object:
    try:
        return tomllib.loads(f"v = {part}")["v"]
    except tomllib.TOMLDecodeError:
        return part.strip()


def _text(value: object) -> str:
    """A value as `--set` takes it: names without quotes, as a person writes them."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value) and _value(value) == value:
        return value
    text = tomli_w.dumps({"v": value}, multiline_strings=False).partition("=")[2]
    return " ".join(text.split()).replace("[ ", "[").replace(", ]", "]")


def plan_arms(
    source: str,
    varied: Sequence[Varied],
    *,
    repeats: int,
    overrides: Sequence[str] = (),
    reseed_data: bool = False,
) -> tuple[PlannedArm, ...]:
    """Every combination of the values, the last key changing first, with the configuration of each repeat.

    Repeat r of every arm has the seeds of its configuration plus r - 1: the same in all arms, so that differences
    between arms can be taken repeat by repeat. A study compares by itself: `comparison.enabled` is off.

    Raises:
        ConfigError: A key is unknown, an arm's settings contradict each other, or they are too many.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: expected a number from 1", hint="three or more show a spread")
    seeds = [*REPEATED, *(["data"] if reseed_data else [])]
    fixed = {item.partition("=")[0].strip() for item in overrides}
    for vary in varied:
        if vary.key in fixed:
            raise ConfigError(f"`{vary.key}` is both set and varied", hint="leave out one of --set and --vary")
        if repeats > 1 and vary.key.partition(".")[0] == "seeds" and vary.key.partition(".")[2] in seeds:
            raise ConfigError(f"`{vary.key}` moves with the repeats", hint="leave it to --repeats, or --repeats 1")
        _check_known(source, vary)
    many = repeats * math.prod(len(vary.values) for vary in varied)
    if many > MAX_RUNS:
        raise ConfigError(f"these are {many} runs, more than {MAX_RUNS}", hint="vary less, or in several studies")
    arms = []
    for number, values in enumerate(itertools.product(*(vary.values for vary in varied)), 1):
        settings = {vary.key: value for vary, value in zip(varied, values, strict=True)}
        loaded = _load(source, settings, overrides)
        label = label_of(settings)
        slug = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:60]
        runs = tuple(
            PlannedRun(
                folder=f"runs/{number:02d}-{slug}-r{repeat}",
                repeat=repeat,
                config=_moved(loaded.config, seeds, repeat - 1),
                plain=_moved(loaded.plain, seeds, repeat - 1),
            )
            for repeat in range(1, repeats + 1)
        )
        arms.append(PlannedArm(label=label, settings=settings, runs=runs))
    return tuple(arms)


def _check_known(source: str, vary: Varied) -> None:
    """A key that no run has is named by itself, not as part of some arm."""
    if vary.key not in known_keys() and not vary.key.startswith("model.options."):
        load_config(source, [f"{vary.key}={vary.values[0]}"])  # says what is wrong with it, and what may be meant
        raise ConfigError(f"--vary {vary.key}: not a single setting", hint="`coterie config show` lists all settings")


def _load(source: str, settings: Mapping[str, str], overrides: Sequence[str]) -> LoadedConfig:
    words = [*overrides, *(f"{key}={value}" for key, value in settings.items()), "comparison.enabled=false"]
    try:
        return load_config(source, words)
    except ConfigError as e:
        raise ConfigError(f"the arm `{label_of(settings)}` is not possible: {e}", hint=e.hint) from e


def _moved(config: RunConfig, seeds: Sequence[str], by: int) -> RunConfig:
    tree = config.model_dump()
    tree["seeds"] |= {name: (tree["seeds"][name] + by) % 2**63 for name in seeds}
    return RunConfig.model_validate(tree)


def label_of(settings: Mapping[str, str]) -> str:
    """An arm's values for people: a name alone, anything else behind the last part of its key."""
    return ", ".join(setting_label(key, value) for key, value in settings.items())


def setting_label(key: str, value: str) -> str:
    """One setting for people: `fedprox`, `proximal mu 0.1`, `partial work true`."""
    leaf = key.rpartition(".")[2].replace("_", " ")
    shown = value.strip('"')
    return shown if leaf == "name" else f"{leaf} {shown}"
