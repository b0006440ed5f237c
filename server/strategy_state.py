"""What a strategy keeps between rounds, saved and restored without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from common.errors import RunError
from common.flower import from_record, to_record

_LAYOUT: Final = "layout.json"


def strategy_state(strategy: Strategy) -> dict[str, NDArray[Any]]:
    """All that a strategy keeps between rounds, as flat named arrays that need no pickle.

    Every attribute is looked at: arrays, and records, dicts and lists of arrays, become `attribute/key`; plain numbers,
    texts, functions and the order of keys go into one JSON document, `layout.json` (uint8[n]). Functions are settings
    and are only noted. The arrays are the strategy's own: save them, do not write to them.

    Guarantee:
        After `restore_strategy`, a fresh strategy made with the same settings continues bit for bit like this one.

    Raises:
        RunError: An attribute is of another kind. Nothing is left out silently.
    """
    layout: dict[str, Any] = {}
    state: dict[str, NDArray[Any]] = {}
    for name, value in vars(strategy).items():
        layout[name], parts = _describe(strategy, name, value)
        state |= {f"{name}/{key}": np.asarray(part) for key, part in parts.items()}
    document = {"strategy": type(strategy).__qualname__, "attributes": layout}
    state[_LAYOUT] = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, NDArray[Any]]) -> None:
    """Put a snapshot of `strategy_state` into a fresh strategy. The arrays are copied.

    Raises:
        RunError: The state is of another strategy, incomplete, or holds something unknown. The strategy is unchanged.
    """
    try:
        document = json.loads(state[_LAYOUT].tobytes())
        layout = dict(document["attributes"])
        if document["strategy"] != type(strategy).__qualname__ or layout.keys() != vars(strategy).keys():
            raise _misfit(strategy, f"it is of {document['strategy']}, or keeps other attributes")
        expected = {f"{name}/{key}" for name, entry in layout.items() for key in entry.get("keys", ())} | {_LAYOUT}
        if state.keys() != expected:
            raise _misfit(strategy, f"arrays missing or unexpected: {sorted(state.keys() ^ expected)}")
        values = {name: _rebuild(name, entry, state) for name, entry in layout.items() if entry["kind"] != "function"}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _misfit(strategy, f"it cannot be read ({type(e).__name__})") from e
    for name, value in values.items():
        setattr(strategy, name, value)


def _describe(strategy: Strategy, name: str, value: object) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """An attribute's entry in the layout, and its arrays by key."""
    if value is None or type(value) in (bool, int, float, str):
        return {"kind": "value", "value": value}, {}
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return {"kind": "function"}, {}
    kind: str = ""
    parts: Mapping[str, Any] = {}
    if isinstance(value, np.ndarray | np.generic):
        kind, parts = "array", {"": value}
    elif isinstance(value, ArrayRecord):
        kind, parts = "record", from_record(value)
    elif type(value) is dict and all(isinstance(key, str) for key in value):
        kind, parts = "dict", value
    elif type(value) is list:
        kind, parts = "list", {str(i): part for i, part in enumerate(value)}
    numeric = all(isinstance(part, np.ndarray | np.generic) and part.dtype.kind in "biuf" for part in parts.values())
    if not kind or not numeric:
        raise RunError(
            f"{type(strategy).__name__}.{name} ({type(value).__name__}) cannot be saved, so no run could be resumed",
            hint="keep a strategy's state in numpy arrays, ArrayRecords, dicts or lists of arrays, or plain numbers",
        )
    # A numpy scalar is not an array of no dimensions: arithmetic on the latter gives the former.
    scalars = [key for key, part in parts.items() if isinstance(part, np.generic)]
    return {"kind": kind, "keys": list(parts), "scalars": scalars}, parts


def _rebuild(name: str, entry: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> object:
    """An attribute's value from its entry and arrays. Raises KeyError or TypeError where they make no sense."""
    if entry["kind"] == "value":
        return entry["value"]
    parts = {key: state[f"{name}/{key}"].copy() for key in entry["keys"]}
    parts |= {key: parts[key][()] for key in entry["scalars"]}
    match entry["kind"]:
        case "array":
            return parts[""]
        case "record":
            return to_record(parts)
        case "dict":
            return parts
        case "list":
            return list(parts.values())
    raise KeyError(entry["kind"])


def _misfit(strategy: Strategy, problem: str) -> RunError:
    return RunError(
        f"the saved state does not fit the strategy {type(strategy).__name__}: {problem}",
        hint="resume with the configuration and version that wrote it, or start a new run",
    )
