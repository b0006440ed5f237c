"""Which ledgers a user of `coterie ledger` means: a site's, or those of a simulated run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ledgers import IDENTITY, LEDGERS, SiteLedgers
from common.errors import LedgerError
from common.kit import KIT
from common.privacy.accounting.budget import Budget
from common.privacy.ledger import FileLedger
from common.privacy.ledger.chain import Record
from common.privacy.ledger.partitions import PARTITIONS, partition_ledgers
from common.privacy.ledger.simulated import STORE, read_store
from common.privacy.ledger.standing import Standing

STATE = "state"
"""A kit's folder for what lasts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One ledger as it was found.

    Attributes:
        name: The data set's (or, simulated, the client's) name.
        where: The file.
        standing: Where it stands.
        records: Its records.
        problem: Why it cannot be trusted, or empty; then nothing is said of what was spent.
    """

    name: str
    where: str
    standing: Standing
    records: Sequence[Record]
    problem: str = ""


def entries_of(what: str, state: Path, data: str | None) -> list[Entry]:
    """The ledgers that a user means; those that cannot be trusted say why.

    Raises:
        LedgerError: There are none, or not the one that was named.
    """
    folder, name = (Path(what), data) if what and Path(what).is_dir() else (state, what or data)
    if (folder / STORE).is_file():
        replays = read_store(folder / STORE)
        entries = [
            Entry(name=key, where=str(folder / STORE), standing=replay.standing, records=replay.chain.records)
            for key, replay in replays.items()
        ]
    elif (folder / PARTITIONS).is_dir():
        entries = [entry_of(ledger) for ledger in partition_ledgers(folder)]
    else:
        site = _site(folder)
        entries = [entry_of(site.named(known)) for known in site.names()]
    chosen = [entry for entry in entries if name in {None, entry.name}]
    if not chosen:
        names = ", ".join(entry.name for entry in entries)
        raise LedgerError(
            f"there is no ledger of {name} in {folder}" if entries else f"there are no ledgers in {folder}",
            hint=f"there are: {names}" if names else "--state names a site's state folder, or a run's folder",
        )
    return chosen


def entry_of(ledger: FileLedger) -> Entry:
    """One ledger in a file of its own, sound or not."""
    with ledger.locked(writing=False):
        found = ledger.look()
    return Entry(
        name=ledger.name,
        where=str(ledger.path),
        standing=found.standing,
        records=found.chain.records,
        problem=found.problem,
    )


def _site(state: Path) -> SiteLedgers:
    """A site's ledgers, to be read or administered; none is opened. A kit has its state folder inside."""
    ledgers = (state / STATE if (state / KIT).is_file() else state) / LEDGERS
    return SiteLedgers(ledgers, state / IDENTITY, Budget(epsilon=1.0, delta=0.5, order=2))


def existing(state: Path, name: str) -> FileLedger:
    """The ledger of a data set, sound or not.

    Raises:
        LedgerError: There is none.
    """
    site = _site(state)
    if name not in site.names():
        raise LedgerError(
            f"there is no ledger of {name} in {state}",
            hint=f"there are: {', '.join(site.names()) or 'none'}; --state names a site's state folder",
        )
    return site.named(name)
