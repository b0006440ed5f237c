"""A study's folder: `study.json` says what was planned, `runs/` holds a run folder for each arm and repeat.

    study.json               arms, settings and configuration of every run; makes a folder a study
    study.lock               held by the process that carries it out
    trace.jsonl              the devices' trace, if there is one
    runs/                    run folders like any other: `coterie runs --root STUDY/runs` lists them
    result.json, report.html what it came to

Files are replaced whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from common.config import RunConfig
from common.disk import acquire_lock, atomic_file, disk_errors
from common.errors import RunError
from server.store import new_folder
from simulations.how import TRACE, How
from simulations.study.arms import PlannedArm, PlannedRun, Varied

PLAN: Final = "study.json"
LOCK: Final = "study.lock"
RESULT: Final = "result.json"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What was planned.

    Attributes:
        name: The runs' name.
        source: The scenario or file that it began from.
        command: What to type for the same study again.
        overrides: What `--set` changed in all arms.
        varied: The varied settings.
        arms: Their combinations; the first is what the others are compared with.
        targets: Accuracies whose reaching is timed; empty takes shares of the best arm's.
        how: How runs are carried out.
    """

    name: str
    source: str
    command: str
    overrides: tuple[str, ...]
    varied: tuple[Varied, ...]
    arms: tuple[PlannedArm, ...]
    targets: tuple[float, ...]
    how: How

    @property
    def repeats(self) -> int:
        """Runs of every arm."""
        return len(self.arms[0].runs)

    @property
    def runs(self) -> int:
        """All runs."""
        return sum(len(arm.runs) for arm in self.arms)


def create(study: Study, path: Path | None, *, root: Path) -> Path:
    """Write the plan into `path`, or into a new folder of `root` named after the time (UTC) and the study.

    Raises:
        RunError: The folder holds something already, or cannot be written.
    """
    path = new_folder(root, study.name) if path is None else path
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
    if PLAN in names:
        raise RunError(f"{path} already holds a study", hint=f"go on with --resume {path}, or choose another folder")
    if names - {LOCK, TRACE, f".{PLAN}.tmp"}:
        raise RunError(f"{path} is not empty", hint="choose a new or empty folder")
    if study.how.trace is not None:
        with disk_errors(study.how.trace, "read"):
            trace = study.how.trace.read_bytes()
        _write(path / TRACE, trace)
    _write(path / PLAN, json.dumps(_document(study), indent=1).encode() + b"\n")
    return path


def read(path: Path) -> Study:
    """The study of a folder.

    Raises:
        RunError: It is none, or damaged.
    """
    if not (path / PLAN).is_file():
        raise RunError(f"{path} is not a study: it has no {PLAN}", hint="name the folder that `coterie study` made")
    with disk_errors(path / PLAN, "read"):
        text = (path / PLAN).read_bytes()
    try:
        return _study(json.loads(text), path)
    except (ValueError, KeyError, TypeError, ValidationError) as e:
        raise RunError(f"{path / PLAN} is damaged", hint="restore it, or start a new study") from e


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a study while its runs are carried out.

    Raises:
        RunError: Another process does.
    """
    with disk_errors(path):
        lock = acquire_lock(path / LOCK)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Replace what the study ended with."""
    _write(path / RESULT, json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def _document(study: Study) -> dict[str, Any]:
    how = study.how
    return {
        "format": FORMAT,
        "name": study.name,
        "source": study.source,
        "command": study.command,
        "set": list(study.overrides),
        "vary": {varied.key: list(varied.values) for varied in study.varied},
        "targets": list(study.targets),
        "site_file": None if how.site_file is None else str(how.site_file.resolve()),
        "batching": how.batching,
        "arms": [
            {
                "label": arm.label,
                "settings": dict(arm.settings),
                "runs": [
                    {
                        "folder": run.folder,
                        "repeat": run.repeat,
                        "config": run.config.model_dump(mode="json"),
                        "plain": run.plain.model_dump(mode="json"),
                    }
                    for run in arm.runs
                ],
            }
            for arm in study.arms
        ],
    }


def _study(document: Mapping[str, Any], path: Path) -> Study:
    if document["format"] != FORMAT or document["batching"] not in {"auto", "on", "off"} or not document["arms"]:
        raise ValueError("not what was written")
    site, trace = document["site_file"], path / TRACE
    return Study(
        name=str(document["name"]),
        source=str(document["source"]),
        command=str(document["command"]),
        overrides=tuple(document["set"]),
        varied=tuple(Varied(key=key, values=tuple(values)) for key, values in document["vary"].items()),
        targets=tuple(float(target) for target in document["targets"]),
        how=How(
            site_file=None if site is None else Path(site),
            batching=document["batching"],
            trace=trace if trace.is_file() else None,
        ),
        arms=tuple(
            PlannedArm(
                label=str(arm["label"]),
                settings=dict(arm["settings"]),
                runs=tuple(
                    PlannedRun(
                        folder=_below(run["folder"]),
                        repeat=int(run["repeat"]),
                        config=RunConfig.model_validate(run["config"]),
                        plain=RunConfig.model_validate(run["plain"]),
                    )
                    for run in arm["runs"]
                ),
            )
            for arm in document["arms"]
        ),
    )


def _below(folder: str) -> str:
    """A run's folder is one of the study's own, whatever the file says."""
    parts = Path(folder).parts
    if len(parts) != 2 or parts[0] != "runs" or parts[1] in {"", ".", ".."}:
        raise ValueError("not a folder of this study")
    return folder
