"""Rounds over mutual TLS, sealed and masked against sealed alone: each party is a process, and nobody trains."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from simulations.benchmarks.plane.processes import line, module, tell

VALUES = 1_000_000
PEER_PROCESSES = 2


def figures(kits: Path, *, pairs: int, rounds: int, sites: int = 10, values: int = VALUES) -> dict[str, float]:
    """A masked round's wall time against a sealed one's, each the mean over a run, its set-up of keys included.

    Args:
        kits: Of at least so many sites.
        pairs: So many runs of each kind, in turn, after a short one of each that is not counted.
        rounds: Of a run, which is one epoch.
        sites: How many take part.
        values: Parameters of the model.
    """
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary, ExitStack() as stack:
        words = (kits / "server", values, rounds, sites, pairs, Path(temporary))
        coordinator = stack.enter_context(module("coordinator", *words, package="secagg"))
        address = f"127.0.0.1:{line(coordinator)}"
        for share in range(min(PEER_PROCESSES, sites)):
            mine = [kits / f"site-{i:03d}" for i in range(share, sites, PEER_PROCESSES)]
            line(stack.enter_context(module("peer", address, *mine, package="secagg")))
        tell(coordinator)
        measured: dict[str, list[float]] = json.loads(line(coordinator))
    both = list(zip(measured["masked"], measured["sealed"], strict=True))
    return {
        "round_10x1m_seconds": median(measured["masked"]),
        "round_10x1m_over_sealed": median(masked / sealed for masked, sealed in both),
    }
