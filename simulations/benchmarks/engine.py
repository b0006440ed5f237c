"""How much the engine adds to the training itself: rounds of Coterie against rounds of a plain torch loop.

One pair is one round of each, in turn, in the same process; a figure is the median of the pairs' ratios. Our side is
the whole coordinator with its default mods, a run folder and a checkpoint every round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch

from common.config import RunConfig
from server.coordinator import Observer, RoundRecord
from server.store import RunFolder
from simulations.benchmarks.reference import WORKLOADS, Workload, plain_rounds
from simulations.benchmarks.workloads import ReferenceSampler, model_name
from simulations.run import execute, prepare

SITE = Path(__file__).with_name("site.toml")
WARM_UP, PAIRS, QUICK_PAIRS = 3, 20, 6
TOLERANCE = 1e-3


def figures(*, quick: bool) -> dict[str, float]:
    """The engine's figures; a figure whose weights differ from the loop's is left out."""
    pairs = QUICK_PAIRS if quick else PAIRS
    plan = {
        "cnn_cpu_over_loop": ("cnn", 1, process_time),
        "cnn_two_workers_wall_over_loop": ("cnn", 2, perf_counter),
        "linear_1000_cpu_over_loop": ("linear_1000", 1, process_time),
    }
    measured = {key: ratio(WORKLOADS[name], workers, clock, pairs) for key, (name, workers, clock) in plan.items()}
    return {key: value for key, value in measured.items() if value is not None}


def ratio(workload: Workload, workers: int, clock: Callable[[], float], pairs: int) -> float | None:
    """Median over pairs of a round's time over the loop's; None if the weights end more than 1e-3 apart."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        config = _config(workload, WARM_UP + pairs)
        prepared = prepare(config, folder=Path(temporary), site_file=SITE)
        data = {
            number: (client.train.inputs, client.train.targets)
            for number, client in enumerate(prepared.federation.clients)
        }
        turns = _Turns(plain_rounds(workload, data), clock)
        with RunFolder.create(config, Path(temporary) / "run") as folder:
            outcome = execute(
                prepared, workers=workers, folder=folder, observer=turns, sampler=ReferenceSampler(workload)
            )
    expected = turns.model.state_dict()
    apart = max(float((torch.from_numpy(v.copy()) - expected[k]).abs().max()) for k, v in outcome.arrays.items())
    return median(turns.ratios[WARM_UP:]) if apart <= TOLERANCE else None


class _Turns(Observer):
    """After each of our rounds, one of the loop's."""

    model: torch.nn.Module

    def __init__(self, loop: Iterator[torch.nn.Module], clock: Callable[[], float]) -> None:
        self._loop, self._clock = loop, clock
        self._mark = clock()
        self.ratios: list[float] = []

    def round_finished(self, record: RoundRecord) -> None:  # noqa: ARG002
        """Stop our clock, run the loop's round under its own, start ours again."""
        ours = self._clock() - self._mark
        begin = self._clock()
        self.model = next(self._loop)
        self._mark = self._clock()
        self.ratios.append(ours / (self._mark - begin))


def _config(workload: Workload, rounds: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": workload.name.replace("_", "-"),
            "rounds": rounds,
            "model": {"name": model_name(workload)},
            "data": {"name": model_name(workload), "partition": "natural", "clients": 0},
            "training": {
                "local_epochs": 1,
                "batch_size": workload.batch_size,
                "learning_rate": workload.learning_rate,
                "shuffle": False,
                "device": "cpu",
            },
            "evaluation": {"every": 0},
        }
    )
