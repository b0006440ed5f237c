"""`python -m simulations.benchmarks.cohort.workers WORKERS ROUNDS`: a round for each line that comes, and its seconds.

Two such processes, with one worker and with two, take turns. Last, each prints a digest of the weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter

from common.fingerprint import model_digest
from server.coordinator import Observer, RoundRecord
from server.store import RunFolder
from simulations.benchmarks.cohort.loop import SITE, configuration
from simulations.benchmarks.reference import WORKLOADS
from simulations.benchmarks.workloads import ReferenceSampler
from simulations.run import execute, prepare

WORKLOAD = "cnn"


class _OnDemand(Observer):
    """Begins a round when it is told to, and tells how long it took."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._begin = 0.0

    def round_started(self, server_round: int, cohort: list[str]) -> None:  # noqa: ARG002 - see `Observer`
        """Wait for a line before the first; later ones have begun when the last one was told."""
        if not self._begin:
            self._wait()

    def round_finished(self, record: RoundRecord) -> None:
        """Tell, and wait for the next line."""
        print(perf_counter() - self._begin, flush=True)
        if record.server_round < self._rounds:
            self._wait()

    def _wait(self) -> None:
        sys.stdin.readline()
        self._begin = perf_counter()


def main(workers: int, rounds: int) -> None:
    """Train; a line in for a line out."""
    workload, turns = WORKLOADS[WORKLOAD], _OnDemand(rounds)
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        path = Path(temporary) / "run"
        config = configuration(workload, rounds)
        prepared = prepare(config, folder=path, site_file=SITE)
        with RunFolder.create(config, path) as folder:
            outcome = execute(
                prepared,
                batching="auto",
                workers=workers,
                folder=folder,
                observer=turns,
                sampler=ReferenceSampler(workload),
            )
    print(model_digest(outcome.arrays).hex(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
