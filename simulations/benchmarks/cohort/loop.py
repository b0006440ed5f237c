"""Rounds of Coterie against rounds of the plain loop, as in `simulations.benchmarks.engine`: in turn, in one process.

Our side trains as `coterie simulate` does when nothing is said: the first rounds find out whether stacking pays, and
are not counted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from common.config import RunConfig
from server.coordinator import Observer, Outcome, RoundRecord
from server.store import RunFolder
from simulations.batching import PROBES, SMALLEST_COHORT
from simulations.benchmarks.reference import WORKLOADS, Workload, plain_rounds
from simulations.benchmarks.workloads import ReferenceSampler, model_name
from simulations.run import Prepared, execute, prepare

SITE = Path(__file__).parents[1] / "site.toml"
TOLERANCE = 1e-3
WARM_UP = PROBES + 1
"""The last of them is the first that trains as `auto` has chosen."""
SMALL_WARM_UP = 2
"""Of cohorts that are too small for a choice."""

TARGET_EPSILON = 8.0


def ratio(name: str, pairs: int, *, private: bool = False, runs: int = 1) -> float | None:
    """Median over the pairs of all runs of a round's CPU seconds over the loop's.

    None if the weights of a run end more than 1e-3 apart; with privacy, if a ledger does not hold every round.

    Args:
        name: Of the workload.
        pairs: Rounds of a run that are counted.
        private: Whether each example is protected.
        runs: How many. Training amplifies rounding: of a convolutional model it is below 1e-6 after two rounds, and
            beyond any tolerance after ten.
    """
    found = [_ratios(WORKLOADS[name], pairs, private=private) for _ in range(runs)]
    return median(each for one in found if one for each in one) if all(found) else None


def _ratios(workload: Workload, pairs: int, *, private: bool) -> list[float] | None:
    """Of one run."""
    warm_up = WARM_UP if workload.clients_per_round >= SMALLEST_COHORT else SMALL_WARM_UP
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        path = Path(temporary) / "run"
        config = configuration(workload, warm_up + pairs, private=private)
        prepared = prepare(config, folder=path, site_file=SITE)
        data = {
            number: (client.train.inputs, client.train.targets)
            for number, client in enumerate(prepared.federation.clients)
        }
        turns = _Turns(plain_rounds(workload, data))
        with RunFolder.create(config, path) as folder:
            outcome = execute(
                prepared, batching="auto", folder=folder, observer=turns, sampler=ReferenceSampler(workload)
            )
        sound = _accounted(prepared) if private else _equal(outcome, turns.model)
    return turns.ratios[warm_up:] if sound else None


def configuration(workload: Workload, rounds: int, *, private: bool = False) -> RunConfig:
    """A workload as a run of Coterie's; with privacy its batches are Poisson samples of the same expected size."""
    tree: dict[str, Any] = {
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
        "cohort": {"size": workload.clients_per_round},
        "evaluation": {"every": 0},
    }
    if private:
        tree["training"] |= {"local_steps": workload.examples // workload.batch_size}
        tree["privacy"] = {
            "unit": "example",
            "target_epsilon": TARGET_EPSILON,
            "sampling_rate": workload.batch_size / workload.examples,
            "expected_batch_size": workload.batch_size,
        }
    return RunConfig.model_validate(tree)


class _Turns(Observer):
    """After each of our rounds, one of the loop's."""

    model: torch.nn.Module

    def __init__(self, loop: Iterator[torch.nn.Module]) -> None:
        self._loop = loop
        self._mark = process_time()
        self.ratios: list[float] = []

    def round_finished(self, record: RoundRecord) -> None:  # noqa: ARG002
        """Stop our clock, run the loop's round under its own, start ours again."""
        ours = process_time() - self._mark
        begin = process_time()
        self.model = next(self._loop)
        self._mark = process_time()
        self.ratios.append(ours / (self._mark - begin))


def _equal(outcome: Outcome, model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    apart = max(float((torch.from_numpy(v.copy()) - expected[k]).abs().max()) for k, v in outcome.arrays.items())
    return apart <= TOLERANCE


def _accounted(prepared: Prepared) -> bool:
    """Whether every client's ledger holds every round, and what it spent is finite and within the target."""
    if prepared.sites.ledgers is None:
        return False
    rounds = list(range(1, prepared.config.rounds + 1))
    ledgers = [prepared.sites.ledgers.of(name) for name in prepared.federation.names]
    return all([event.server_round for event in ledger.events()] == rounds for ledger in ledgers) and all(
        math.isfinite(epsilon) and 0 < epsilon <= TARGET_EPSILON * (1 + 1e-6) for epsilon in prepared.spent().values()
    )
