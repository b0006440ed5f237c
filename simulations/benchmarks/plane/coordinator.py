"""The coordinator's process: its real round loop over the plane, with a model that nobody trains.

Run as a process: `python -m simulations.benchmarks.plane.coordinator KIT MEGABYTES ROUNDS SITES FOLDER`. Prints the
port, waits for a line on stdin, runs, and prints one JSON document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from common.config import load_config
from common.kit import Kit, load_kit
from server.coordinator import Coordinator, Job, Observer, RoundRecord
from server.grids.plane import PlaneGrid
from server.grids.sealed import SealedGrid
from server.plane.hub import Hub
from server.plane.server import PlaneServer
from server.store import RunFolder
from simulations.benchmarks.plane.processes import log_errors_only, peak_bytes

LAYERS = 10


class Rounds(Observer):
    """Wall seconds of each round, from its start to its checkpoint."""

    def __init__(self) -> None:
        self._begin = perf_counter()
        self.seconds: list[float] = []

    def round_started(self, server_round: int, cohort: list[str]) -> None:  # noqa: ARG002
        """A round ends where the next one starts: with its checkpoint on the disk."""
        now = perf_counter()
        if server_round > 1:
            self.seconds.append(now - self._begin)
        self._begin = now

    def end(self) -> None:
        """The last round has ended."""
        self.seconds.append(perf_counter() - self._begin)

    def round_finished(self, record: RoundRecord) -> None:
        """A round without every site measures something else.

        Raises:
            RuntimeError: A site did not answer.
        """
        if record.failures:
            raise RuntimeError(f"round {record.server_round}: {record.failures}")


def train(kit: Kit, hub: Hub, *, sites: list[str], megabytes: float, rounds: int, folder: Path) -> Rounds:
    """A whole run over some of the attached sites."""
    model = nn.ParameterList([torch.zeros(values(megabytes)) for _ in range(LAYERS)])
    config = load_config(None, [f"rounds={rounds}", "evaluation.every=0"]).config
    watch = Rounds()
    with RunFolder.create(config, folder) as run:
        grid = SealedGrid(
            PlaneGrid(hub, run_id=bytes(16), sites=sites),
            keys=kit.keys,
            records=kit.sites,
            run_id=bytes(16),
            config_digest=bytes.fromhex(config.digest()),
            folder=hub.blobs,
        )
        Coordinator(Job(config=config, model=model, folder=run, observer=watch)).run(grid)
    watch.end()
    return watch


def values(megabytes: float) -> int:
    """Float32 values in one layer of a model."""
    return round(megabytes * 1e6 / 4 / LAYERS)


def main() -> None:
    """Serve one run."""
    log_errors_only()
    kit = load_kit(Path(sys.argv[1]), role="coordinator")
    megabytes, rounds, count, folder = float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    torch.set_num_threads(1)
    sites = sorted(kit.sites)[:count]
    hub = Hub(kit.state / "plane")
    with PlaneServer(kit, host="127.0.0.1", port=0, hub=hub) as plane:
        print(plane.port, flush=True)
        sys.stdin.readline()
        hub.wait_attached(sites)
        start = peak_bytes()
        watch = train(kit, hub, sites=sites, megabytes=megabytes, rounds=rounds, folder=folder)
    models = (peak_bytes() - start) / (values(megabytes) * 4 * LAYERS)
    print(json.dumps({"round_seconds": median(watch.seconds), "models": models}), flush=True)


if __name__ == "__main__":
    main()
