"""A study whose runs are made up: figures that can be worked out by hand, in folders like those of real runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from server.report.record import Record, read_record
from simulations.how import How
from simulations.study import folder
from simulations.study.arms import parse_vary, plan_arms
from simulations.study.folder import Study
from simulations.study.summary import Summary, summarise
from tests.helpers.runs import tree

Made = tuple[Path, Study, Summary]
Make = Callable[..., Made]


def course(accuracies: Sequence[float | None], *, seconds: float | None = 10.0) -> list[dict[str, Any]]:
    """Rounds with these accuracies, of so many virtual seconds each, a quarter of the work wasted."""
    return [
        {
            "server_round": number, "cohort": ["a", "b"], "survivors": ["a"], "failures": {"b": "deadline-exceeded"},
            "accuracy": accuracy, "seconds": {"train": 0.1},
            "clock": None if seconds is None
            else {"at_seconds": seconds * number, "work_seconds": 8.0, "wasted_seconds": 2.0},
        }
        for number, accuracy in enumerate(accuracies, 1)
    ]  # fmt: skip


def complete(path: Path, config: Mapping[str, Any], rows: list[dict[str, Any]], **result: Any) -> None:
    """A run folder as a finished run leaves it."""
    path.mkdir(parents=True)
    (path / "run.toml").write_text(tomli_w.dumps(config))
    (path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "name": "tiny", "status": "completed", "rounds": len(rows), "accuracy": rows[-1]["accuracy"], "simulated": True,
        "clients": {"a": {"accuracy": 0.9, "test_examples": 5}, "b": {"accuracy": 0.5, "test_examples": 5}},
        "seconds": {"total": 2.0},
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps({**facts, **result}))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a study from `--vary` words and, by arm and repeat, the accuracies of its rounds."""

    def made(
        vary: Sequence[str], arms: Sequence[Sequence[Sequence[float | None]]], *, seconds: float | None = 10.0,
        targets: tuple[float, ...] = (), overrides: Sequence[str] = (), **result: Any,
    ) -> Made:  # fmt: skip
        source = tmp_path / "tiny.toml"
        source.write_text(tomli_w.dumps(tree()))
        varied = parse_vary(vary)
        if seconds is not None:
            overrides = [*overrides, "simulation.devices.examples_per_second=5"]
        planned = plan_arms(str(source), varied, repeats=len(arms[0]), overrides=overrides)
        study = Study(
            name="tiny", source=str(source), command="coterie study tiny", overrides=tuple(overrides), varied=varied,
            arms=planned, targets=targets, how=How(),
        )  # fmt: skip
        path = folder.create(study, tmp_path / "study", root=tmp_path)
        records: dict[str, Record] = {}
        for arm, courses in zip(planned, arms, strict=True):
            for run, accuracies in zip(arm.runs, courses, strict=True):
                config = run.config.model_dump(mode="json", exclude_none=True)
                complete(path / run.folder, config, course(accuracies, seconds=seconds), **result)
                records[run.folder] = read_record(path / run.folder)
        return path, study, summarise(study, records)

    return made
