"""`python -m simulations.benchmarks.cohort.population CLIENTS`: peak memory of a run over a large population, in MB.

What counts is what the run adds to a process that has imported everything. The run is whole: sampler, ledger of who
took part, run folder, checkpoints, result and report.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

from common.config import RunConfig
from server.store import RunFolder
from simulations.benchmarks.cohort.loop import SITE
from simulations.benchmarks.plane.processes import peak_bytes, resident_bytes
from simulations.results import FolderObserver, write_results
from simulations.run import execute, prepare

COHORT, ROUNDS = 100, 8


def configuration(clients: int) -> RunConfig:
    """The `linear_1000` workload's model and clients, as many as are wanted, a hundred of them a round."""
    return RunConfig.model_validate(
        {
            "name": "population",
            "rounds": ROUNDS,
            "model": {"name": "linear-1000-reference"},
            "data": {"name": "population-reference", "partition": "natural", "clients": clients},
            "training": {"local_epochs": 1, "batch_size": 20, "learning_rate": 0.1, "device": "cpu"},
            "cohort": {"size": COHORT},
        }
    )


def peak_over_start(clients: int) -> float:
    """Megabytes that this process needed at most beyond those that it had."""
    config = configuration(clients)
    gc.collect()
    begin = resident_bytes()
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        path = Path(temporary) / "run"
        prepared = prepare(config, folder=path, site_file=SITE)
        with RunFolder.create(config, path) as folder:
            keeper = FolderObserver(prepared, folder)
            outcome = execute(prepared, batching="auto", folder=folder, observer=keeper)
            keeper.close()
            write_results(prepared, outcome, folder, seconds=0.0, comparison=None)
    return (peak_bytes() - begin) / 1e6


if __name__ == "__main__":
    print(peak_over_start(int(sys.argv[1])))
