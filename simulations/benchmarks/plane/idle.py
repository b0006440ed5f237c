"""What a thousand attached sites cost the coordinator while nothing happens; and a round over some of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from simulations.benchmarks.plane.processes import line, module, tell

SITES, QUICK_SITES = 1000, 200
ASKED = 100
PROCESSES = 4


def figures(folder: Path, make_kits: Callable[[Path, int], Path], *, quick: bool) -> dict[str, float]:
    """Megabytes (10^6 bytes) and share of a core of the coordinator's process; seconds of a round over 100 of them.

    `quick` attaches 200 sites and extrapolates to nothing: its figures have the number in their names.
    """
    sites = QUICK_SITES if quick else SITES
    kits = make_kits(folder, sites)
    with ExitStack() as stack:
        seconds = 20 if quick else 120
        coordinator = stack.enter_context(module("crowd", kits / "server", sites, ASKED, seconds, folder / "run"))
        address = f"127.0.0.1:{line(coordinator)}"
        share = sites // PROCESSES
        crowds = [
            stack.enter_context(module("waiting", address, kits, i * share, (i + 1) * share)) for i in range(PROCESSES)
        ]
        for crowd in crowds:
            line(crowd)
        tell(coordinator)
        measured = json.loads(line(coordinator))
    return {
        f"idle_{sites}_rss_mb": measured["rss_mb"],
        f"idle_{sites}_core_percent": measured["core_percent"],
        f"round_over_{ASKED}_of_{sites}_seconds": measured["round_seconds"],
    }
