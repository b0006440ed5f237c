"""Ledgers of a simulated run that several machines write: a file for each client, in a folder that all of them share.

    ledgers/client-01.jsonl           chained as a site's own
    ledgers/counters/client-01.json   its counter

The one database of a run on one machine (`simulated`) is no place for them: its write-ahead log needs memory that all
writers share, which no file system between machines gives. A file's lock works there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import Record
from common.privacy.ledger.file import FileLedger
from common.privacy.ledger.found import Found
from common.privacy.ledger.standing import Protected, opening

PARTITIONS = "ledgers"
"""Folder in a run's folder. Where it is, the run's ledgers are in it, whatever engine goes on with the run."""
_COUNTERS = "counters"
_SIMULATED = "it is a simulated ledger"  # what a site's ledger says of one


class PartitionLedger(FileLedger):
    """One simulated client's ledger in a file of its own.

    Guarantee: it is marked as simulated: a site refuses to go on with it, and this refuses a site's.
    """

    def opening(self, ledger: str, budget: Budget) -> Record:
        """The first record."""
        return opening(
            ledger=ledger,
            budget=budget,
            unit=self._unit or "example",
            simulated=True,
            names=self._names,
            fingerprints=self._fingerprints,
        )

    def look(self, before: Found | None = None) -> Found:
        """What is on the disk, sound or not. The caller holds the lock."""
        found = super().look(before)
        if found.problem == _SIMULATED:
            return replace(found, problem="")
        if not found.problem and found.chain.records and not found.standing.simulated:
            return replace(found, problem="it is the ledger of a real site")
        return found


def partition_ledger(
    run: Path, client: str, budget: Budget, *, unit: Protected = "example", allow_non_private: bool = False
) -> PartitionLedger:
    """The ledger of one client of a run, whether it is there or not.

    Args:
        run: The run's folder.
        client: Its name, or one that no client has.
        budget: Ceiling with which it opens.
        unit: What it counts.
        allow_non_private: Whether releases without noise are permitted.
    """
    folder = run / PARTITIONS
    return PartitionLedger(
        folder / f"{client}.jsonl",
        counter=folder / _COUNTERS / f"{client}.json",
        budget=budget,
        unit=unit,
        allow_non_private=allow_non_private,
    )


def partition_ledgers(run: Path) -> Iterator[PartitionLedger]:
    """All ledgers of a run, by name, to be read; also those of which only the counter is left."""
    folder = run / PARTITIONS
    names = {path.stem for path in folder.glob("*.jsonl")} | {path.stem for path in (folder / _COUNTERS).glob("*.json")}
    for name in sorted(names):
        path, counter = folder / f"{name}.jsonl", folder / _COUNTERS / f"{name}.json"
        yield PartitionLedger(path, counter=counter, budget=Budget(epsilon=1.0, delta=0.5, order=2))
