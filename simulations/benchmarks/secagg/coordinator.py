"""The coordinator's process: whole runs over the plane, with secure aggregation and without, in turn.

Run as a process: `python -m simulations.benchmarks.secagg.coordinator KIT VALUES ROUNDS SITES PAIRS FOLDER`. Prints the
port, waits for a line on stdin, runs, and prints one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from common.config import load_config
from common.kit import Kit, load_kit
from server.coordinator import Coordinator, Job
from server.grids.plane import PlaneGrid
from server.grids.sealed import SealedGrid
from server.plane.hub import Hub
from server.plane.server import PlaneServer
from server.store import RunFolder
from simulations.benchmarks.plane.coordinator import LAYERS, Rounds
from simulations.benchmarks.plane.processes import log_errors_only


def run(kit: Kit, hub: Hub, *, sites: list[str], values: int, rounds: int, folder: Path, masked: bool) -> float:
    """Mean wall seconds of a round of one run."""
    model = nn.ParameterList([torch.zeros(values // LAYERS) for _ in range(LAYERS)])
    settings = [
        f"rounds={rounds}",
        "evaluation.every=0",
        "strategy.weighting=equal",
        f"privacy.secure_aggregation={str(masked).lower()}",
    ]
    config, run_id, watch = load_config(None, settings).config, os.urandom(16), Rounds()
    with RunFolder.create(config, folder) as kept:
        grid = SealedGrid(
            PlaneGrid(hub, run_id=run_id, sites=sites),
            keys=kit.keys,
            records=kit.sites,
            run_id=run_id,
            config_digest=bytes.fromhex(config.digest()),
            folder=hub.blobs,
        )
        records = {name: kit.sites[name] for name in sites}
        job = Job(config=config, model=model, folder=kept, observer=watch, run_id=run_id.hex(), sites=records)
        Coordinator(job).run(grid)
    watch.end()
    return mean(watch.seconds)


def main() -> None:
    """Serve all runs."""
    log_errors_only()
    kit = load_kit(Path(sys.argv[1]), role="coordinator")
    values, rounds, count, pairs = map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    sites, folder = sorted(kit.sites)[:count], Path(sys.argv[6])
    hub = Hub(kit.state / "plane")
    seconds: dict[str, list[float]] = {"sealed": [], "masked": []}
    with PlaneServer(kit, host="127.0.0.1", port=0, hub=hub) as plane:
        print(plane.port, flush=True)
        sys.stdin.readline()
        hub.wait_attached(sites)
        for pair in range(1 + pairs):
            for kind, times in seconds.items():
                least = rounds if pair else 1
                took = run(
                    kit,
                    hub,
                    sites=sites,
                    values=values,
                    rounds=least,
                    folder=folder / f"{kind}-{pair}",
                    masked=kind == "masked",
                )
                times.append(took)
    print(json.dumps({kind: times[1:] for kind, times in seconds.items()}), flush=True)


if __name__ == "__main__":
    main()
