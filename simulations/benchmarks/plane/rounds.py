"""Whole rounds over mutual TLS with sealing: the real coordinator and real agents, each a process; nobody trains."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

from simulations.benchmarks.plane.processes import line, module, tell

SMALL, LARGE = 1.0, 250.0
"""Megabytes (10^6 bytes) of the model."""
PEER_PROCESSES = 4


def figures(kits: Path, *, quick: bool) -> dict[str, float]:
    """Seconds a round (median; a checkpoint is part of it) and the coordinator's peak memory in models."""
    small = run(kits, sites=2, megabytes=SMALL, rounds=5 if quick else 30)
    two = run(kits, sites=2, megabytes=LARGE, rounds=2 if quick else 6)
    sixteen = run(kits, sites=16, megabytes=LARGE, rounds=1 if quick else 2)
    return {
        "round_1mb_seconds": small["round_seconds"],
        "round_250mb_seconds": two["round_seconds"],
        "server_peak_models_2_sites": two["models"],
        "server_peak_models_16_sites": sixteen["models"],
    }


def run(kits: Path, *, sites: int, megabytes: float, rounds: int) -> dict[str, float]:
    """One run over so many of the sites; what the coordinator's process measured."""
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary, ExitStack() as stack:
        words = (kits / "server", megabytes, rounds, sites, Path(temporary) / "run")
        coordinator = stack.enter_context(module("coordinator", *words))
        address = f"127.0.0.1:{line(coordinator)}"
        for share in range(min(PEER_PROCESSES, sites)):
            mine = [kits / f"site-{i:03d}" for i in range(share, sites, PEER_PROCESSES)]
            line(stack.enter_context(module("peer", address, *mine)))
        tell(coordinator)
        measured: dict[str, float] = json.loads(line(coordinator))
    return measured
