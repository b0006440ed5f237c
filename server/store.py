"""One run's folder on disk: what is in it, and how it is written so that an interruption never damages it.

    run.toml                       the configuration with every value; makes a folder a run
    plain.toml                     the same without privacy, for a comparison
    run.lock                       held (flock) by the process that writes the run
    rounds.jsonl                   one JSON document a round
    checkpoints/round-NNNNN.safetensors
    result.json, model.safetensors what the run ended with
    checkpoints/released/          privacy unit client: what was released, before anybody saw it; secret like updates
    events/, report.html, ledgers.db, spool/, how.json, batching.json, trace.jsonl, states.db  written by others
    ledgers/, keys/, cluster.token on a cluster, in place of ledgers.db

Files are replaced whole (temporary file, fsync, rename) or only appended to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import tomli_w

from common.config import RunConfig, load_config
from common.disk import acquire_lock, atomic_file, disk_errors, is_locked
from common.errors import ConfigError, RunError
from server.checkpoint import checkpoint_files

Status = Literal["running", "interrupted", "completed", "failed"]

_CONFIG, _LOCK, _ROUNDS, _RESULT = "run.toml", "run.lock", "rounds.jsonl", "result.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One line of a list of runs: what can be read of it.

    Attributes:
        config: None where run.toml cannot be read.
        last_round: The last round on record, 0 before the first.
        result: None without a readable result.json.
        problem: What is damaged, in one sentence; empty if nothing is.
    """

    path: Path
    created: datetime
    status: Status
    config: RunConfig | None
    last_round: int
    result: dict[str, Any] | None
    problem: str


class RunFolder:
    """A run on disk: `create` and `resume` write it and hold its lock, `open` only reads it.

    Guarantee:
        At most one process writes a run. The lock ends with the process, however it ends.
    """

    def __init__(self, path: Path, *, lock: int | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, config: RunConfig, path: Path | None = None, *, root: Path = Path("runs")) -> Self:
        """Start a new run in `path`, or in a new folder of `root` named after the time (UTC) and the run.

        Raises:
            RunError: The folder holds a run already, or anything else; it is being written; or it cannot be written.
        """
        path = new_folder(root, config.name) if path is None else path
        with disk_errors(path), ExitStack() as undo:
            path.mkdir(parents=True, exist_ok=True)
            _check_unused(path)
            run = cls(path, lock=acquire_lock(path / _LOCK))
            undo.callback(run.close)
            _check_unused(path)  # again: another process may have had the lock just before
            run.checkpoints.mkdir(exist_ok=True)
            values = config.model_dump(mode="json", exclude_none=True)  # TOML has no null; None is always a default
            with atomic_file(path / _CONFIG) as temporary:
                temporary.write_text(tomli_w.dumps(values), encoding="utf-8")
            undo.pop_all()
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """A run to read from.

        Raises:
            RunError: The folder is not a run.
        """
        if not (path / _CONFIG).is_file():
            raise RunError(f"{path} is not a run: it has no {_CONFIG}", hint="`coterie runs` lists them")
        return cls(path)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """A run to go on writing; a line of rounds.jsonl that was cut off is dropped.

        Raises:
            RunError: The folder is not a run, or another process is writing it.
        """
        cls.open(path)
        rounds = path / _ROUNDS
        with disk_errors(rounds), ExitStack() as undo:
            run = cls(path, lock=acquire_lock(path / _LOCK))
            undo.callback(run.close)
            if rounds.exists():
                os.truncate(rounds, rounds.read_bytes().rfind(b"\n") + 1)
            undo.pop_all()
        return run

    def close(self) -> None:
        """Give the lock back; the folder can still be read."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing alone would leave it to a forked child
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def status(self) -> Status:
        """Running (somebody holds the lock), completed or failed (has a result), interrupted (can be resumed).

        A run that ended without a result and without a checkpoint failed.
        """
        if is_locked(self.path / _LOCK):
            return "running"
        with suppress(RunError):
            if (result := self.read_result()) is not None:
                return "failed" if result.get("status") == "failed" else "completed"
        return "interrupted" if checkpoint_files(self.checkpoints) else "failed"

    def config(self) -> RunConfig:
        """The run's configuration, with the digest it was started with.

        Raises:
            RunError: run.toml is missing or damaged.
        """
        try:
            return load_config(self.path / _CONFIG).config
        except ConfigError as e:
            raise RunError(str(e), hint="the run's own configuration was changed; restore it or start a new run") from e

    def append_round(self, row: Mapping[str, Any]) -> None:
        """Add one round's record; it outlives this process once the call returns.

        Args:
            row: JSON-able, with `server_round`; values that are not finite become null, numpy's scalars plain numbers.

        Raises:
            RunError: The disk is full or the file cannot be written; then nothing was added.
            ValueError: `server_round` is missing.
        """
        if type(row.get("server_round")) is not int:
            raise ValueError("a round's record needs its server_round")
        self._check_writing()
        line = _encode(row) + b"\n"
        path = self.path / _ROUNDS
        with disk_errors(path), path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds' records, in the order they were added; a line that is still being written is not among them.

        Raises:
            RunError: A line is damaged, or the file cannot be read.
        """
        path = self.path / _ROUNDS
        with disk_errors(path, "read"):
            data = path.read_bytes() if path.exists() else b""
        rows = [_decode(line, f"{path}, line {n}") for n, line in enumerate(data.split(b"\n")[:-1], 1)]
        if any(type(row.get("server_round")) is not int for row in rows):
            raise RunError(f"{path} is damaged: a line without server_round", hint="remove that line")
        return rows

    def truncate_rounds(self, after_round: int) -> None:
        """Forget the rounds after `after_round`, which a resumed run does again.

        Raises:
            RunError: A line is damaged, or the file cannot be written.
        """
        kept = [row for row in self.rounds() if row["server_round"] <= after_round]
        self.write(_ROUNDS, b"".join(_encode(row) + b"\n" for row in kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace result.json whole. `status` is `completed` unless the result says `failed`.

        Raises:
            RunError: The disk is full or the file cannot be written; then the former result is still there.
        """
        self.write(_RESULT, _encode({"status": "completed", **result}, indent=2) + b"\n")

    def read_result(self) -> dict[str, Any] | None:
        """What the run ended with, or None if it has not ended.

        Raises:
            RunError: The file is damaged or cannot be read.
        """
        path = self.path / _RESULT
        with disk_errors(path, "read"):
            return _decode(path.read_bytes(), str(path)) if path.exists() else None

    def write(self, name: str, data: bytes) -> None:
        """Replace one file of the folder whole.

        Raises:
            RunError: The disk is full or the file cannot be written; then the former file is still there.
        """
        self._check_writing()
        with atomic_file(self.path / name) as temporary:
            temporary.write_bytes(data)

    def _check_writing(self) -> None:
        if self._lock is None:
            raise RunError(f"{self.path} was opened for reading", hint="use RunFolder.resume to write to a run")


def list_runs(root: Path) -> list[RunSummary]:
    """All runs of a folder, newest first. A damaged or unfinished run is listed with what can be read of it."""
    if not root.is_dir():
        return []
    with disk_errors(root, "read"):
        runs = [_summarise(path) for path in root.iterdir() if (path / _CONFIG).is_file()]
    return sorted(runs, key=lambda run: (run.created, run.path.name), reverse=True)


def new_folder(root: Path, name: str) -> Path:
    """A folder that did not exist; the time in its name is in UTC."""
    base = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{name}"
    for number in count(1):
        path = root / (base if number == 1 else f"{base}-{number}")
        with disk_errors(path), suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


def _check_unused(path: Path) -> None:
    """Refuse a folder in which something would be overwritten."""
    names = {entry.name for entry in path.iterdir()}
    if _CONFIG in names:
        raise RunError(f"{path} already holds a run", hint="resume that run, or choose another folder")
    if names - {_LOCK, f".{_CONFIG}.tmp", "checkpoints"}:  # left by a run that ended before it began
        raise RunError(f"{path} is not empty and not a run", hint="choose a new or empty folder")


def _summarise(path: Path) -> RunSummary:
    """What can be read of a run."""
    run = RunFolder(path)
    parts: dict[str, Any] = {}
    problem = ""
    for name, read in (("rounds", run.rounds), ("result", run.read_result), ("config", run.config)):
        try:
            parts[name] = read()
        except RunError as e:
            problem = str(e)
    rounds = parts.get("rounds")
    return RunSummary(
        path=path,
        created=datetime.fromtimestamp((path / _CONFIG).stat().st_mtime, UTC),
        status=run.status,
        config=parts.get("config"),
        last_round=rounds[-1]["server_round"] if rounds else 0,
        result=parts.get("result"),
        problem=problem,
    )


def _encode(document: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Strict JSON, which knows neither NaN nor infinities."""
    return json.dumps(_plain(document), indent=indent, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """The same value with numpy's scalars as Python's, and None for what is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _decode(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or RunError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RunError(f"{where} is damaged", hint="restore it from a copy, or remove the damaged text")
    return document
