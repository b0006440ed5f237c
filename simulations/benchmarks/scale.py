"""What a round costs against clients, model and steps: constants fitted to some runs, checked against others.

`python -m simulations.benchmarks.scale` prints one JSON document. A client's data are made when it is asked for, and
the model is a perceptron of a width that is given. All runs of a kind share a process, the small ones first: peak
memory never falls.

A round's CPU seconds are taken to be

    A + n * (a + b * P) + n * s * (c + d * P)

of n clients that each take s steps of 20 examples over a model of P parameters: A is what a round costs by itself; a
client costs a and, for each parameter that it takes in and gives back, b; a step c and, for each parameter, d. Peak
memory over the start is taken to be M + m * P.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any, Final, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.config import DataSettings, RunConfig
from common.data.population import Population
from common.names import NumberedNames
from common.schema import ClientData, DataSchema, Examples, Federation
from server.coordinator import Observer, RoundRecord
from server.store import RunFolder

FEATURES, CLASSES, BATCH = 64, 10, 20
_SCHEMA: Final = DataSchema(kind="tabular", input_shape=(FEATURES,), num_classes=CLASSES)
_ROUNDS, _WARM_UP = 6, 2
_SITE: Final = '[models.scale]\nsource = "{file}:net"\n[data.scale]\nsource = "python:{file}:data"\n'

How = Literal["one by one", "stacked", "one by one, private", "stacked, private"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run.

    Attributes:
        how: How clients train.
        clients: Asked in a round.
        width: Of the model's two hidden layers.
        steps: Of each client.
        workers: Processes that train.
        population: Clients that there are; 0: as many as are asked.
    """

    how: How
    clients: int
    width: int
    steps: int = 1
    workers: int = 1
    population: int = 0

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(values.numel() for values in net(_SCHEMA, width=self.width).parameters())

    def terms(self) -> list[float]:
        """What the constants of the CPU model are multiplied by."""
        n, s, p = self.clients, self.steps, self.parameters
        return [1.0, n, n * p, n * s, n * s * p]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run cost: CPU seconds of a round, of this process and of its workers, and megabytes over the start."""

    driver_seconds: float
    worker_seconds: float
    megabytes: float

    @property
    def seconds(self) -> float:
        """Of all processes."""
        return self.driver_seconds + self.worker_seconds


def _points(how: How) -> tuple[list[Point], list[Point]]:
    """Runs to fit, and runs to check."""
    few, many = (10, 40) if "one" in how else (64, 512)
    fit = [
        Point(how=how, clients=n, width=w, steps=s)
        for n, w, s in (
            (few, 16, 1), (many, 16, 1), (many, 16, 5), (few, 128, 1), (many, 128, 4), (few, 320, 1), (few, 320, 4),
            (few, 640, 1), (few, 640, 3), (few, 1200, 1),
        )
    ]  # fmt: skip
    check = [
        Point(how=how, clients=n, width=w, steps=s)
        for n, w, s in ((2 * many, 16, 2), (many, 200, 2), (2 * few, 400, 2), (few, 960, 1))
    ]
    return fit, check


def net(schema: DataSchema, *, width: int) -> nn.Module:
    """A perceptron with two hidden layers of one width."""
    return nn.Sequential(
        nn.Linear(schema.input_shape[0], width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, schema.num_classes),
    )


def data(settings: DataSettings, seed: int) -> Federation:
    """As many clients of 100 examples as are wanted."""

    def make(number: int) -> ClientData:
        generator = torch.Generator().manual_seed(seed + number)
        targets = torch.randint(CLASSES, (100,), generator=generator)
        examples = Examples(inputs=torch.randn(100, FEATURES, generator=generator), targets=targets)
        return ClientData(name=names[number], train=examples, test=examples.part(0, 1))

    names = NumberedNames(settings.clients)
    return Federation(schema=_SCHEMA, clients=Population(names, make), test=make(0).train)


def configuration(point: Point) -> RunConfig:
    """The run of a point."""
    tree: dict[str, Any] = {
        "name": "scale",
        "rounds": _ROUNDS,
        "model": {"name": "scale", "options": {"width": point.width}},
        "data": {"name": "scale", "partition": "natural", "clients": point.population or point.clients},
        "cohort": {"size": point.clients},
        "training": {"local_steps": point.steps, "batch_size": BATCH, "learning_rate": 0.01, "device": "cpu"},
        "evaluation": {"every": 0},
    }
    if "private" in point.how:
        tree["privacy"] = {"unit": "example", "target_epsilon": 8.0, "expected_batch_size": BATCH, "sampling_rate": 0.2}
    return RunConfig.model_validate(tree)


class _Clock(Observer):
    """CPU seconds of each round."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float]] = []
        self._mark = process_time(), 0.0

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`."""
        if record.failures:
            raise RuntimeError(f"clients failed: {record.failures}")
        now = process_time(), _children_seconds()
        self.rounds.append((now[0] - self._mark[0], now[1] - self._mark[1]))
        self._mark = now


def measure(point: Point, *, start: float | None = None) -> Measured:
    """Carry a run out in this process; `start` is the memory to count from, by default what there is before it."""
    from simulations.run import execute, prepare

    torch.set_num_threads(1)
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        site = Path(temporary) / "site.toml"
        site.write_text(_SITE.format(file=Path(__file__).absolute()))
        config = configuration(point)
        prepared = prepare(config, folder=Path(temporary) / "run", site_file=site)
        start = _peak_megabytes() if start is None else start
        with RunFolder.create(config, Path(temporary) / "run") as folder:
            execute(
                prepared,
                workers=point.workers,
                folder=folder,
                observer=clock,
                batching="on" if "stacked" in point.how else "off",
            )
    rounds = clock.rounds[_WARM_UP:]
    return Measured(
        driver_seconds=min(driver for driver, _ in rounds),  # the round that others disturbed least
        worker_seconds=min(worker for _, worker in rounds),
        megabytes=_peak_megabytes() - start,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants of the model: seconds and megabytes."""

    round: float
    client: float
    client_parameter: float
    step: float
    step_parameter: float
    start: float
    parameter: float

    @classmethod
    def of(cls, points: Sequence[Point], measured: Sequence[Measured]) -> Self:
        """The constants, none of them negative, that are least wrong relative to what was measured."""
        seconds = np.array([found.seconds for found in measured])
        memory = np.array([found.megabytes for found in measured])
        cpu = _non_negative(np.array([point.terms() for point in points]) / seconds[:, None], np.ones(len(points)))
        sizes = np.array([[1.0, point.parameters] for point in points])
        return cls(**dict(zip(cls.__slots__, [*cpu, *_non_negative(sizes, memory)], strict=True)))

    def seconds(self, point: Point) -> float:
        """CPU seconds of a round."""
        constants = (self.round, self.client, self.client_parameter, self.step, self.step_parameter)
        return float(np.dot(point.terms(), constants))

    def megabytes(self, point: Point) -> float:
        """Peak memory over the start."""
        return self.start + self.parameter * point.parameters


def _non_negative(terms: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """Least squares without negative constants: what would be negative is left out."""
    kept = list(range(terms.shape[1]))
    while True:
        scale = np.abs(terms[:, kept]).max(axis=0)
        found = np.linalg.lstsq(terms[:, kept] / scale, values, rcond=None)[0] / scale
        if (found >= 0).all():
            return [float(found[kept.index(i)]) if i in kept else 0.0 for i in range(terms.shape[1])]
        kept.remove(kept[int(np.argmin(found * scale))])


def figures(how: How) -> dict[str, Any]:
    """Constants, and what was predicted and measured of runs that were not fitted; in a fresh process."""
    fit, check = _points(how)
    measure(fit[0])  # what only the first run of a process pays for
    start = _peak_megabytes()
    ordered = sorted([*fit, *check], key=lambda point: (point.parameters, point.clients))
    found = {point: measure(point, start=start) for point in ordered}
    constants = Fit.of(fit, [found[point] for point in fit])
    checked = [
        {
            "clients": point.clients,
            "parameters": point.parameters,
            "steps": point.steps,
            "predicted_seconds": constants.seconds(point),
            "measured_seconds": found[point].seconds,
            "predicted_megabytes": constants.megabytes(point),
            "measured_megabytes": found[point].megabytes,
        }
        for point in check
    ]
    return {"constants": asdict(constants), "checked": checked}


def _apart(how: How) -> dict[str, Any]:
    """`figures` in a process of its own."""
    words = [sys.executable, "-m", "simulations.benchmarks.scale", how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)  # noqa: S603 - itself
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _children_seconds() -> float:
    """CPU seconds of this process's children that live."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if _descends(int(fields[1])):
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def _descends(process: int) -> bool:
    while process > 1:
        if process == os.getpid():
            return True
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(words: Sequence[str]) -> None:
    """Everything, or the kind, or the one run (as JSON), that was named."""
    found: Any
    if not words:
        found = {how: _apart(how) for how in get_args(How)}
    elif words[0] in get_args(How):
        found = figures(words[0])  # type: ignore[arg-type]
    elif not words[0].startswith("{"):
        sys.exit(
            f"error: {words[0]} cannot be measured\nhint: name one of: {'; '.join(get_args(How))}. Without a name: all"
        )
    else:
        found = asdict(measure(Point(**json.loads(words[0]))))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
