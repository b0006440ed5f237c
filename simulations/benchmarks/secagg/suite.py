"""All figures of secure aggregation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from simulations.benchmarks.plane.suite import make_kits
from simulations.benchmarks.secagg import epochs, masking, rounds
from simulations.benchmarks.secagg.crowd import EPOCH_ROUNDS

SITES = 10


def figures(*, quick: bool) -> dict[str, float]:
    """Masks, machines and rounds; `quick` takes fewer repetitions and a smaller crowd, under its own name."""
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        kits = make_kits(Path(temporary), SITES)
        return {
            **masking.figures(repeats=3 if quick else 9),
            **epochs.of_a_hundred(rounds=1 if quick else 3),
            **rounds.figures(kits, sites=SITES, pairs=1 if quick else 3, rounds=EPOCH_ROUNDS),
            **(epochs.of_a_crowd(count=epochs.QUICK_CROWD) if quick else epochs.of_a_crowd()),
        }
