"""Runs over real clients with tiny models: a training round of four of them takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from server.coordinator import Observer, Outcome, RoundRecord
from server.store import RunFolder
from simulations.run import Prepared, execute, prepare

SITE = Path(__file__).parents[1] / "simulations" / "site_fixtures" / "site.toml"

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.9},
    "fedadam": {"server_learning_rate": 0.1},
    "fedyogi": {"server_learning_rate": 0.1},
    "fedadagrad": {"server_learning_rate": 0.1},
    "qfedavg": {"q": 0.2},
    "fedmedian": {},
    "fedtrimmedavg": {"trim_fraction": 0.2},
    "krum": {"malicious_clients": 1},
    "multikrum": {"malicious_clients": 1, "clients_to_keep": 3},
    "bulyan": {"malicious_clients": 1},
}
"""All twelve, with options for seven clients or more."""


def tree(**changes: Any) -> dict[str, Any]:
    """A configuration's tables: `tiny` on `blobs`, four clients, three rounds; a change replaces or extends a table."""
    base: dict[str, Any] = {
        "name": "tiny",
        "rounds": 3,
        "model": {"name": "tiny"},
        "data": {"name": "blobs", "partition": "natural", "clients": 4},
        "training": {"local_epochs": 1, "batch_size": 8, "learning_rate": 0.3, "device": "cpu"},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def configuration(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(tree(**changes))


def private(**changes: Any) -> RunConfig:
    """The same with example-level privacy."""
    privacy = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}
    return configuration(training={"local_steps": 1}, **{"privacy": privacy, **changes})


def prepared(ledgers: Path, config: RunConfig | None = None, **changes: Any) -> Prepared:
    return prepare(config or configuration(**changes), folder=ledgers, site_file=SITE)


def run(
    path: Path,
    config: RunConfig | None = None,
    *,
    workers: int = 1,
    observer: Log | None = None,
    insecure_seed: int | None = None,
    **changes: Any,
) -> tuple[Outcome, Log]:
    """A run in `path`, or its continuation where one is there; and what an observer was told."""
    config = config or configuration(**changes)
    log = observer or Log()
    possible = prepare(config, folder=path, site_file=SITE, insecure_seed=insecure_seed)
    with RunFolder.resume(path) if (path / "run.toml").exists() else RunFolder.create(config, path) as folder:
        log.folder = folder
        return execute(possible, workers=workers, folder=folder, observer=log), log


class Log(Observer):
    """Keeps every record, also in the run folder if there is one."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self.records: list[RoundRecord] = []
        self.fates: list[tuple[str, Any]] = []

    def reply_received(self, client: str, failure: Any) -> None:
        self.fates.append((client, failure))

    def round_finished(self, record: RoundRecord) -> None:
        self.records.append(record)
        if self.folder is not None:
            self.folder.append_round({"server_round": record.server_round, "cohort": record.cohort})

    @property
    def failures(self) -> list[dict[str, str]]:
        return [record.failures for record in self.records]


def as_bytes(arrays: dict[str, NDArray[Any]]) -> dict[str, tuple[str, bytes]]:
    """Arrays in a form in which equal means equal to the bit."""
    return {name: (str(values.dtype), np.ascontiguousarray(values).tobytes()) for name, values in arrays.items()}


def rows(path: Path) -> list[int]:
    """The rounds on record in a run folder, whole lines only."""
    file = path / "rounds.jsonl"
    text = file.read_bytes() if file.exists() else b""
    return [json.loads(line)["server_round"] for line in text.split(b"\n")[:-1]]
