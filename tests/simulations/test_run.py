"""One simulated run, as a library."""

from __future__ import annotations

from pathlib import Path

from simulations.run import execute
from tests.helpers.runs import as_bytes, prepared


def test_a_prepared_run_can_be_executed_again(tmp_path: Path) -> None:
    """It starts from the same weights each time, so it ends with the same ones, to the bit."""
    possible = prepared(tmp_path)
    first, second = execute(possible), execute(possible)
    assert as_bytes(first.arrays) == as_bytes(second.arrays)
