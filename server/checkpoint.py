"""A run's state between two rounds, in one file that is either whole or not there. Never pickle.

A checkpoint is a safetensors file with arrays `model/...`, `strategy/...`, `best/...` and `noise/...`. Its header
carries everything else as JSON, and a SHA-256 over all of it: safetensors notices a file that was cut off, not one
whose bytes changed. It guards against failing disks, not against somebody who can write the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.disk import atomic_file, disk_errors
from common.errors import RunError

Arrays = Mapping[str, NDArray[Any]]

KEPT: Final = 2
_VERSION: Final = 1
_HEADER: Final = "checkpoint"
_NAME: Final = re.compile(r"round-(\d{5,})\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        server_round: The last completed round; 0 is the starting model.
        config_digest: `RunConfig.digest()` of the run.
        arrays: The model, in the model's key order.
        strategy: What `strategy_state.strategy_state` returned.
        sampler: What `CohortSampler.state` returned.
        progress: Small and JSON-able: the best round so far, what patience has counted, spent budget.
        best_arrays: The best model so far, where the run selects it.
        noise: What `Asking.state` returned; with correlated noise there are sums without noise in it.
        warnings: On loading, what was wrong with newer files; one sentence each.
    """

    server_round: int
    config_digest: str
    arrays: Arrays
    strategy: Arrays = field(default_factory=dict)
    sampler: Mapping[str, int] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    best_arrays: Arrays | None = None
    noise: Arrays = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class _DamagedError(Exception):
    """A file is not the checkpoint that was written."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the newest two; those of later rounds belong to a course given up.

    Args:
        folder: The run's folder of checkpoints; made if missing. Only the process that holds the run's lock writes it.
        checkpoint: Arrays of any layout in memory; booleans, integers and floats of 16 to 64 bits.

    Guarantee:
        Older checkpoints are removed only once the new one is on the disk.

    Raises:
        RunError: The disk is full, the folder cannot be written, or an array has a dtype that cannot be saved. Earlier
            checkpoints are still there.
        TypeError: `progress` is not JSON-able.
    """
    spaces = {"model": checkpoint.arrays, "strategy": checkpoint.strategy}
    if checkpoint.best_arrays is not None:
        spaces["best"] = checkpoint.best_arrays
    if checkpoint.noise:
        spaces["noise"] = checkpoint.noise
    body = json.dumps(
        {
            "version": _VERSION,
            "server_round": checkpoint.server_round,
            "config_digest": checkpoint.config_digest,
            "sampler": dict(checkpoint.sampler),
            "progress": dict(checkpoint.progress),
            "keys": {space: list(arrays) for space, arrays in spaces.items()},  # safetensors sorts them
        }
    )
    named = {f"{space}/{name}": values for space, arrays in spaces.items() for name, values in arrays.items()}
    tensors = {name: _plain(name, values) for name, values in named.items()}
    header = {_HEADER: json.dumps({"body": body, "sha256": _digest(body, tensors)})}
    path = _path(folder, checkpoint.server_round)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as e:
            raise RunError(f"{path} cannot be written: {e}", hint="free some space, or mend the folder") from e
    with disk_errors(folder):
        _prune(folder, checkpoint.server_round)
    return path


def load_checkpoint(folder: Path, config_digest: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        folder: The run's folder of checkpoints; may be missing.
        config_digest: `RunConfig.digest()` of the configuration that wants to go on.

    Guarantee:
        Every array is byte for byte what was saved, in the same order, with the same dtype and shape, and writable.

    Raises:
        RunError: The checkpoint is of another configuration or version, all are damaged, or they cannot be read.
    """
    warnings: tuple[str, ...] = ()
    for _, path in reversed(checkpoint_files(folder)):
        try:
            checkpoint = _read(path)
        except _DamagedError as e:
            warnings += (f"{path.name} is damaged ({e}) and was passed over",)
            continue
        _check_configuration(path, checkpoint, config_digest)
        return replace(checkpoint, warnings=warnings)
    if warnings:
        raise RunError(f"{folder} holds no checkpoint that is whole: {'; '.join(warnings)}", hint="start a new run")
    return None


def load_round(folder: Path, server_round: int, config_digest: str) -> Checkpoint | None:
    """The checkpoint of one round, or None where there is none; never another round's instead.

    Raises:
        RunError: It is of another configuration or version, damaged, or cannot be read.
    """
    path = _path(folder, server_round)
    if not path.exists():
        return None
    try:
        checkpoint = _read(path)
    except _DamagedError as e:
        raise RunError(f"{path} is damaged ({e})", hint="start a new run: nothing else can stand for it") from e
    _check_configuration(path, checkpoint, config_digest)
    return checkpoint


def checkpoint_digest(folder: Path, server_round: int) -> str:
    """What one round's checkpoint says of itself: SHA-256 over all of it, in hex; empty where it is not there. Nothing
    is verified, and no array is read.
    """
    path = _path(folder, server_round)
    try:
        with safe_open(path, framework="numpy") as file:
            digest = json.loads((file.metadata() or {})[_HEADER])["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return ""
    return digest if isinstance(digest, str) else ""


def checkpoint_files(folder: Path) -> list[tuple[int, Path]]:
    """Round and path of all checkpoints, whole or damaged, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _path(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:05d}.safetensors"


def _check_configuration(path: Path, checkpoint: Checkpoint, config_digest: str) -> None:
    if checkpoint.config_digest != config_digest:
        raise RunError(
            f"{path} is a checkpoint of another configuration",
            hint="resume with the run's own run.toml, or start a new run",
        )


def _read(path: Path) -> Checkpoint:
    """One file, verified before anything in it is believed."""
    try:
        with disk_errors(path, "read"), safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header["sha256"] != _digest(header["body"], tensors):
            raise _DamagedError("its digest differs")
        body = json.loads(header["body"])
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise _DamagedError("it is incomplete or not a checkpoint") from e
    if body["version"] != _VERSION:
        raise RunError(f"{path} was written by another version", hint="resume with the version that wrote it")
    spaces = {space: {name: tensors[f"{space}/{name}"] for name in names} for space, names in body["keys"].items()}
    return Checkpoint(
        server_round=body["server_round"],
        config_digest=body["config_digest"],
        arrays=spaces["model"],
        strategy=spaces["strategy"],
        sampler=body["sampler"],
        progress=body["progress"],
        best_arrays=spaces.get("best"),
        noise=spaces.get("noise", {}),
    )


def _plain(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Contiguous and in this machine's byte order; keeps arrays without dimensions as they are."""
    if values.dtype.kind not in "biuf":
        raise RunError(
            f"`{name}` cannot be saved in a checkpoint: its dtype is {values.dtype}",
            hint="keep numbers or booleans in arrays",
        )
    return np.asarray(values, dtype=values.dtype.newbyteorder("="), order="C")


def _digest(body: str, tensors: Arrays) -> str:
    """SHA-256 over the body and every array's name, dtype, shape and bytes, in hex."""
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(json.dumps([name, values.dtype.str, values.shape]).encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _prune(folder: Path, server_round: int) -> None:
    """Remove what this checkpoint makes superfluous, and temporary files of a writer that was killed."""
    files = checkpoint_files(folder)
    kept = {path.name for _, path in [f for f in files if f[0] <= server_round][-KEPT:]}
    for path in folder.iterdir():
        if path.name.startswith(".") or (_NAME.fullmatch(path.name) and path.name not in kept):
            path.unlink()
