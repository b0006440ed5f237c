"""What separate machines cost: sealing, uploads, whole rounds over mutual TLS, and a thousand sites that wait.

`figures` makes a federation in a temporary folder and starts coordinator and sites as processes on loopback.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from server.provisioning import provision
from server.provisioning.settings import Federation, PartyTable
from simulations.benchmarks.plane import bulk, idle, rounds, sealing

MIB = 1 << 20


def figures(*, quick: bool) -> dict[str, float]:
    """All figures of the plane; `quick` takes fewer repetitions and smaller models for the memory."""
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        kits = make_kits(Path(temporary), 16)
        return {
            **sealing.figures(pairs=3 if quick else 9),
            **bulk.figures(kits / "server", kits / bulk.SITE, size=256 * MIB, pairs=2 if quick else 7),
            **rounds.figures(kits, quick=quick),
            **idle.figures(Path(temporary) / "crowd", kits, quick=quick),
        }


def make_kits(folder: Path, sites: int) -> Path:
    """Kits of a federation with so many sites, named `site-000` and so on; each pins all the others."""
    names = {f"site-{i:03d}": PartyTable() for i in range(sites)}
    federation = Federation(name="benchmark", server="127.0.0.1:8443", sites=names)
    provision(federation, folder / "kits")
    return folder / "kits"
