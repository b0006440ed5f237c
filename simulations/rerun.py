"""`coterie simulate --rerun RUN`: a finished run once more, and whether it came to the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.disk import disk_errors
from common.errors import ConfigError, RunError
from server.store import RunFolder
from simulations.batching import read_record
from simulations.how import How
from simulations.runner import configurations

_MODEL = "model.safetensors"
_COURSE = ("server_round", "cohort", "survivors", "failures", "train_loss", "accuracy", "loss", "staleness", "clock")
"""What has to be equal in every round: all that does not measure this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """A run that is to be repeated."""

    path: Path
    config: RunConfig
    plain: RunConfig
    how: How
    batching: Mapping[str, Any] | None


def original(path: Path) -> Original:
    """A finished run, with all that decided its bytes.

    Raises:
        RunError: It is not complete, or something of it is missing.
        ConfigError: It cannot come to the same bytes: its noise was secure.
    """
    folder = RunFolder.open(path)
    if folder.read_result() is None:
        raise RunError(f"{path} is not complete", hint=f"coterie simulate --resume {path}")
    config, plain = configurations(folder)
    how = How.kept(path)
    if how.insecure_seed is None and (config.private or config.cohort.sampling == "poisson"):
        raise ConfigError(
            f"{path} drew secure noise, which nobody can draw again",
            hint="private runs repeat only with --insecure-fixed-noise, which protects nobody",
        )
    return Original(path=path, config=config, plain=plain, how=how, batching=read_record(path))


def compare_with(first: Original, second: Path) -> None:
    """Refuse a second run that did not come to the first one's bytes.

    Raises:
        RunError: Its course or its model differs; says from which round on.
    """
    rows = RunFolder.open(first.path).rounds(), RunFolder.open(second).rounds()
    for ours, theirs in zip(*rows, strict=False):
        if any(ours.get(key) != theirs.get(key) for key in _COURSE):
            raise _different(first, second, f"round {ours['server_round']} was another one")
    if len(rows[0]) != len(rows[1]):
        raise _different(first, second, f"it had {len(rows[1])} rounds instead of {len(rows[0])}")
    if _digest(first.path) != _digest(second):
        raise _different(first, second, "its model has other bytes, though every round's figures are the same")


def _different(first: Original, second: Path, why: str) -> RunError:
    return RunError(
        f"{second} is not {first.path} again: {why}",
        hint="the same bytes need the same versions of Coterie and torch, the same processor, and the same data",
    )


def _digest(run: Path) -> bytes:
    path = run / _MODEL
    with disk_errors(path, "read"):
        return hashlib.sha256(path.read_bytes()).digest()
