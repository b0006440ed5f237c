"""The coordinator's process with very many sites: what it costs to keep them, and a round over some of them.

Run as a process: `python -m simulations.benchmarks.plane.crowd KIT SITES ASKED SECONDS FOLDER`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from time import perf_counter, process_time, sleep

import torch

from common.kit import load_kit
from server.plane.hub import Hub
from server.plane.server import PlaneServer
from simulations.benchmarks.plane.coordinator import train
from simulations.benchmarks.plane.processes import resident_bytes
from simulations.benchmarks.plane.rounds import SMALL


def main() -> None:
    """Wait for all of them, watch them idle, then train one round."""
    kit, folder = load_kit(Path(sys.argv[1]), role="coordinator"), Path(sys.argv[5])
    count, asked, seconds = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    hub = Hub(kit.state / "plane")
    with PlaneServer(kit, host="127.0.0.1", port=0, hub=hub) as plane:
        print(plane.port, flush=True)
        sys.stdin.readline()
        sites = [name for name in sorted(kit.sites) if name.startswith("crowd-")]
        hub.wait_attached(sites)
        begin, cpu = perf_counter(), process_time()
        sleep(seconds)
        busy = (process_time() - cpu) / (perf_counter() - begin)
        resident = resident_bytes()
        if len(hub.attached()) < count:
            raise RuntimeError("sites were lost while nothing happened")
        watch = train(kit, hub, sites=sites[:asked], megabytes=SMALL, rounds=1, folder=folder)
    print(
        json.dumps({"rss_mb": resident / 1e6, "core_percent": 100 * busy, "round_seconds": watch.seconds[0]}),
        flush=True,
    )


if __name__ == "__main__":
    main()
