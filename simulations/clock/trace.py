"""Reads a trace of devices: JSON lines, one device a line.

    {"client": "hospital-1", "examples_per_second": 120, "download_mbit": 20, "upload_mbit": 5, "dropout": 0.01,
     "available": [[0, 3600], [7200, 9000]], "period": 86400}

Only `examples_per_second` has to be there. What one line says every line says: a trace in which a bandwidth or a spell
is missing here and there would otherwise count its gaps as devices without limits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.disk import disk_errors
from common.errors import ConfigError
from simulations.clock.devices import Device, TracedDevices
from simulations.clock.presence import Always, Presence, Recorded, Spell

_SPEED, _DOWN, _UP, _DROPOUT = "examples_per_second", "download_mbit", "upload_mbit", "dropout"
_CLIENT, _SPELLS, _PERIOD = "client", "available", "period"
_KEYS: Final = (_CLIENT, _SPEED, _DOWN, _UP, _DROPOUT, _SPELLS, _PERIOD)


@dataclass(frozen=True, kw_only=True, slots=True)
class _At:
    """A line of a trace, for whoever finds fault with it."""

    path: Path
    number: int

    def wrong(self, what: str, hint: str) -> ConfigError:
        """The error that says so."""
        return ConfigError(f"{self.path}, line {self.number}: {what}", hint=hint)


def trace_digest(path: Path) -> str:
    """SHA-256 of a trace, in hexadecimal: what `simulation.devices.trace` holds.

    Raises:
        RunError: The file cannot be read.
    """
    with disk_errors(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_trace(path: Path) -> TracedDevices:
    """The devices of a trace.

    Guarantee: every speed and bandwidth is positive and finite; spells are ascending, apart from each other and within
    their period; clients are named in every line, each once, or in none.

    Raises:
        ConfigError: The file holds anything else; the error names the line.
        RunError: It cannot be read.
    """
    devices: list[Device] = []
    named: dict[str, int] = {}
    first: frozenset[str] | None = None
    for at, fields in _lines(path):
        if first is None:
            first = frozenset(fields)
        _check_keys(at, fields, first)
        if _CLIENT in fields:
            name = fields[_CLIENT]
            if not isinstance(name, str) or not name:
                raise at.wrong("`client` is no name", "write the name of a client of the run as text")
            if name in named:
                raise at.wrong(f"client {name} is there twice", "keep one line a client")
            named[name] = len(devices)
        devices.append(_device(at, fields))
    if not devices:
        raise ConfigError(f"{path} is empty", hint="write one device a line, as JSON")
    return TracedDevices(lines=devices, named=named)


def check_clients(path: Path, devices: TracedDevices, names: Sequence[str]) -> None:
    """See to it that a trace which names clients has a device for each of a run's.

    Raises:
        ConfigError: One is missing.
    """
    missing = next((name for name in names if name not in devices.named), None) if devices.named else None
    if missing is not None:
        raise ConfigError(
            f"{path} has no device for client {missing}",
            hint="add a line for each client, or leave `client` out of all lines: they are then dealt in turn",
        )


def _lines(path: Path) -> Iterator[tuple[_At, dict[str, Any]]]:
    """Every line's fields."""
    with disk_errors(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            at = _At(path=path, number=number)
            if not line.strip():
                raise at.wrong("it is empty", "write one device a line, without gaps")
            try:
                fields = json.loads(line.decode(), object_pairs_hook=_once, parse_constant=_no_number)
            except (ValueError, RecursionError) as e:
                raise at.wrong("it is not JSON, or says the same thing twice", "write one JSON object a line") from e
            if not isinstance(fields, dict):
                raise at.wrong("it is no JSON object", "write one JSON object a line")
            yield at, fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _no_number(word: str) -> float:
    raise ValueError(word)  # NaN and infinities, which JSON does not have


def _check_keys(at: _At, fields: Mapping[str, Any], first: frozenset[str]) -> None:
    """What a line says, every line says."""
    for key in fields:
        if key not in _KEYS:
            raise at.wrong(f"`{key}` is not known", f"a device has {', '.join(_KEYS)}")
    if _SPEED not in fields:
        raise at.wrong(f"`{_SPEED}` is missing", "every device needs a speed")
    if (_SPELLS in fields) != (_PERIOD in fields):
        missing = _PERIOD if _SPELLS in fields else _SPELLS
        raise at.wrong(f"`{missing}` is missing", f"`{_SPELLS}` and `{_PERIOD}` belong together")
    for key in _KEYS:
        if (key in fields) != (key in first):
            where = "which line 1 has" if key in first else "which line 1 does not have"
            verb = "is missing" if key in first else "is there"
            raise at.wrong(f"`{key}` {verb}, {where}", "give it in every line, or in none")


def _device(at: _At, fields: Mapping[str, Any]) -> Device:
    dropout = _number(at, _DROPOUT, fields.get(_DROPOUT, 0.0))
    if not 0 <= dropout < 1:
        raise at.wrong(f"`{_DROPOUT}` is {dropout}", "it is a probability from 0 to less than 1")
    return Device(
        examples_per_second=_rate(at, _SPEED, fields[_SPEED]),
        download_mbit=_rate(at, _DOWN, fields[_DOWN]) if _DOWN in fields else math.inf,
        upload_mbit=_rate(at, _UP, fields[_UP]) if _UP in fields else math.inf,
        dropout=dropout,
        presence=_presence(at, fields[_SPELLS], fields[_PERIOD]) if _SPELLS in fields else Always(),
    )


def _rate(at: _At, key: str, value: object) -> float:
    rate = _number(at, key, value)
    if rate <= 0:
        hint = "it must be more than 0"
        unlimited = f"{hint}; without `{key}` in any line transfers take no time"
        raise at.wrong(f"`{key}` is {rate:g}", hint if key == _SPEED else unlimited)
    return rate


def _number(at: _At, key: str, value: object) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise at.wrong(f"`{key}` is no finite number", "write a number")
    return number


def _presence(at: _At, spells: object, period: object) -> Presence:
    """When the device is there; spells that touch become one."""
    length = _number(at, _PERIOD, period)
    if length <= 0:
        raise at.wrong(f"`{_PERIOD}` is {length:g}", "it is more than 0 seconds")
    if not isinstance(spells, list) or not spells:
        raise at.wrong(f"`{_SPELLS}` names no spell", "leave a device out that is never there")
    found: list[Spell] = []
    for spell in spells:
        if not isinstance(spell, list) or len(spell) != 2:
            raise at.wrong(f"`{_SPELLS}` holds something else than [start, end]", "write seconds: [[0, 3600]]")
        begin, end = (_number(at, _SPELLS, moment) for moment in spell)
        if not 0 <= begin < end <= length:
            raise at.wrong(
                f"the spell [{begin:g}, {end:g}] is not within the period of {length:g} seconds",
                "a spell begins at 0 or later, ends after it began, and not after the period",
            )
        if found and begin < found[-1][1]:
            raise at.wrong(
                f"the spell [{begin:g}, {end:g}] begins before the one before it ends",
                "write spells in ascending order, none over another",
            )
        if found and begin == found[-1][1]:
            begin = found.pop()[0]
        found.append((begin, end))
    return Recorded(tuple(found), period=length)
