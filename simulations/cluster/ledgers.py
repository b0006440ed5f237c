"""Ledgers of a simulated run on several machines: one file a client, with the interface of a run's own store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.disk import disk_errors
from common.errors import CoterieError, RunError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent
from common.privacy.ledger.partitions import PARTITIONS, PartitionLedger, partition_ledger
from common.privacy.ledger.simulated import STORE
from simulations.ledgers import COORDINATOR, SimulatedLedgers


class PartitionLedgers:
    """All ledgers of one simulated run, each in a file of its own.

    Safe with several processes, threads and machines, as far as the file system's locks are; a reservation is on the
    disk when `reserve` returns, as with a site's ledger.

    Args:
        folder: The run's.
        budget: Ceiling of each client's ledger.
        allow_non_private: Whether releases without noise are permitted.
    """

    def __init__(self, folder: Path, budget: Budget, *, allow_non_private: bool = False) -> None:
        self.folder = folder
        self.budget = budget
        self.allow_non_private = allow_non_private
        self._open: dict[str, PartitionLedger] = {}

    def of(self, client: str) -> PartitionLedger:
        """One client's ledger."""
        if client not in self._open:
            self._open[client] = partition_ledger(
                self.folder, client, self.budget, allow_non_private=self.allow_non_private
            )
        return self._open[client]

    def coordinator(self, budget: Budget) -> PartitionLedger:
        """The ledger of what the coordinator releases, which counts clients."""
        return partition_ledger(
            self.folder, COORDINATOR, budget, unit="client", allow_non_private=self.allow_non_private
        )

    def exists(self) -> bool:
        """Whether anything was reserved."""
        return any((self.folder / PARTITIONS).glob("*.jsonl"))

    def spent(self, clients: Iterable[str], *, budget: Budget | None = None) -> dict[str, float]:
        """Epsilon spent of each client's examples.

        Args:
            clients: Their names.
            budget: Where given, what was spent of each client's whole data instead, at this budget's delta and order.

        Raises:
            LedgerError: A file cannot be read or is damaged.
        """
        standings = {name: self.of(name).standing() for name in clients}
        if budget is None:
            return {name: standing.spent for name, standing in standings.items()}
        return {name: spent(standing.events, budget=budget, unit="client") for name, standing in standings.items()}

    def taken(self, clients: Iterable[str]) -> dict[str, int]:
        """How many events each client's ledger has.

        Raises:
            LedgerError: As `spent`.
        """
        return {name: len(self.of(name).standing().events) for name in clients}

    def reserve_many(
        self, clients: Iterable[str], event: PrivacyEvent, *, planned: int
    ) -> dict[str, CoterieError | None]:
        """Reserve the same event in the ledger of each client, one after the other; see `Ledger.reserve`.

        Returns:
            By name, None where the event was written, or why this client's ledger does not take it. The others go on.
        """
        refused: dict[str, CoterieError | None] = {}
        for name in dict.fromkeys(clients):
            try:
                self.of(name).reserve(event, planned=planned)
                refused[name] = None
            except CoterieError as e:
                refused[name] = e
        return refused

    def close(self) -> None:
        """Forget what was read; nothing is held open."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Settings only, and where the files are on every machine."""
        return {
            "folder": self.folder.absolute(),
            "budget": self.budget,
            "allow_non_private": self.allow_non_private,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__init__(**state)  # type: ignore[misc]


def ledgers_in(folder: Path, budget: Budget) -> SimulatedLedgers | PartitionLedgers:
    """The ledgers of the run in a folder: where a cluster has begun it, everybody goes on with its files."""
    if (folder / PARTITIONS).is_dir():
        return PartitionLedgers(folder, budget)
    return SimulatedLedgers(folder / STORE, budget=budget)


def use_partition_files(folder: Path) -> None:
    """Have this run's ledgers kept in files, from its start on.

    Raises:
        RunError: It has ledgers in one database already, or the folder cannot be written.
    """
    if (folder / STORE).exists():
        raise RunError(
            f"{folder} holds the ledgers of a run on one machine, which several machines cannot write",
            hint="resume it with --engine inline, or start a new run on the cluster",
        )
    with disk_errors(folder / PARTITIONS):
        (folder / PARTITIONS).mkdir(mode=0o700, exist_ok=True)
