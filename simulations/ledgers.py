"""Ledgers of simulated clients: one SQLite file a run, written by all of its processes. They never touch a site's."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import BudgetExhaustedError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent
from common.privacy.ledger.chain import Record, line_after
from common.privacy.ledger.simulated import SCHEMA, Replay, check_store, store_errors
from common.privacy.ledger.standing import Protected, event_record, opening

_COORDINATOR = "@coordinator"
"""No client has that name."""

_PATIENCE_SECONDS = 60.0
"""Longest wait for another process's transaction, each of which takes about a millisecond."""


class SimulatedLedgers:
    """All ledgers of one simulated run.

    Safe with several threads and processes, forked or not: each process opens the file for itself. A commit is on the
    disk when `reserve` returns (write-ahead log, `synchronous = FULL`), as with a site's ledger.

    Args:
        path: The SQLite file; made by the first reservation.
        budget: Ceiling of each client's ledger.
        allow_non_private: Whether releases without noise are permitted.
    """

    def __init__(self, path: Path, budget: Budget, *, allow_non_private: bool = False) -> None:
        self.path = path
        self.budget = budget
        self.allow_non_private = allow_non_private
        self._start()

    def of(self, client: str) -> SimulatedLedger:
        """One client's ledger."""
        return SimulatedLedger(self, client, self.budget, "example")

    def coordinator(self, budget: Budget) -> SimulatedLedger:
        """The ledger of what the coordinator releases, which counts clients."""
        return SimulatedLedger(self, _COORDINATOR, budget, "client")

    def exists(self) -> bool:
        """Whether anything was reserved."""
        return self.path.exists()

    def spent(self, clients: Iterable[str], *, budget: Budget | None = None) -> dict[str, float]:
        """Epsilon spent of each client's examples. Only what was added since the last call is read.

        Args:
            clients: Their names.
            budget: Where given, what was spent of each client's whole data instead, at this budget's delta and order.

        Raises:
            LedgerError: The file cannot be read or is damaged.
        """
        names = list(clients)
        with self._reading() as connection:
            if connection is not None:
                self._catch_up(connection)
            standings = {name: self._replay(self.of(name)).standing for name in names}
            if budget is None:
                return {name: standing.spent for name, standing in standings.items()}
            return {name: spent(at.events, budget=budget, unit="client") for name, at in standings.items()}

    def close(self) -> None:
        """Close this process's connection; the next use opens it anew."""
        with self._mutex:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._start()

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a connection belongs to its process."""
        return {"path": self.path, "budget": self.budget, "allow_non_private": self.allow_non_private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        """Python 3.13 warns of connections that were left open."""
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()

    def _start(self) -> None:
        self._process = os.getpid()
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._replays: dict[str, Replay] = {}
        self._seen = 0

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """One state of the file; None where there is no file yet."""
        if not self.path.exists():
            yield None
            return
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if self._process != os.getpid():
            self._forked = self._connection  # it is the parent's: neither used nor closed here
            self._start()
        with self._mutex, store_errors(self.path):
            connection = self._connection = self._connection or self._open()
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as e:
                if not isinstance(e, BudgetExhaustedError):  # what is kept in memory may be ahead of the file
                    self._replays.clear()
                    self._seen = 0
                with suppress(sqlite3.Error):  # some errors have rolled it back
                    connection.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):  # changing the journal's mode does not wait for others that do the same
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
            connection.execute("COMMIT")
            check_store(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _replay(self, ledger: SimulatedLedger) -> Replay:
        if ledger.name not in self._replays:
            self._replays[ledger.name] = Replay.new(ledger.opening_budget, ledger.unit)
        return self._replays[ledger.name]

    def _catch_up(self, connection: sqlite3.Connection) -> None:
        """Read what was added to any ledger."""
        rows = connection.execute(
            "SELECT id, ledger, number, line FROM records WHERE id > ? ORDER BY id", (self._seen,)
        )
        for row, name, number, line in rows:
            replay = self._replays.setdefault(name, Replay.new(self.budget, "example"))
            if number >= len(replay.chain.records):
                replay.read(line, where=self._where(name))
            self._seen = row
        heads = {name: (count, head) for name, count, head in connection.execute("SELECT * FROM heads")}
        for name in {*heads, *(name for name, replay in self._replays.items() if replay.chain.records)}:
            replay = self._replays.setdefault(name, Replay.new(self.budget, "example"))
            replay.check_head(*heads.get(name, (0, "")), where=self._where(name))

    def read(self, ledger: SimulatedLedger) -> Replay:
        """What one ledger holds; to be read at once."""
        with self._reading() as connection:
            return self._replay(ledger) if connection is None else self._current(connection, ledger)

    def _current(self, connection: sqlite3.Connection, ledger: SimulatedLedger) -> Replay:
        """Read what was added to one ledger."""
        replay, where = self._replay(ledger), self._where(ledger.name)
        rows = connection.execute(
            "SELECT line FROM records WHERE ledger = ? AND number >= ? ORDER BY number",
            (ledger.name, len(replay.chain.records)),
        )
        replay.read(b"".join(line for (line,) in rows), where=where)
        head = connection.execute("SELECT count, head FROM heads WHERE ledger = ?", (ledger.name,)).fetchone()
        if head is not None or replay.chain.records:
            replay.check_head(*(head or (0, "")), where=where)
        return replay

    def reserve(self, ledger: SimulatedLedger, event: PrivacyEvent, planned: int) -> float:
        """See `Ledger.reserve`."""
        event.check()
        with self._transaction("BEGIN IMMEDIATE") as connection:
            replay = self._current(connection, ledger)
            spent = replay.standing.admit(event, planned=planned, allow_non_private=self.allow_non_private)
            if not replay.chain.records:
                self._add(connection, ledger, replay, ledger.opening())
            self._add(connection, ledger, replay, event_record(event))
            connection.execute(
                "INSERT OR REPLACE INTO heads VALUES (?, ?, ?)",
                (ledger.name, len(replay.chain.records), replay.chain.head),
            )
            return spent

    def _add(self, connection: sqlite3.Connection, ledger: SimulatedLedger, replay: Replay, record: Record) -> None:
        line, number = line_after(replay.chain, record), len(replay.chain.records)
        replay.read(line, where=self._where(ledger.name))
        connection.execute("INSERT INTO records (ledger, number, line) VALUES (?, ?, ?)", (ledger.name, number, line))

    def _where(self, name: str) -> str:
        return f"{self.path}, ledger {name}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class SimulatedLedger:
    """One ledger of a store; see `common.privacy.Ledger`."""

    store: SimulatedLedgers
    name: str
    opening_budget: Budget
    unit: Protected

    @property
    def budget(self) -> Budget:
        """See `Ledger`."""
        return self.store.read(self).standing.budget

    def events(self) -> list[PrivacyEvent]:
        """See `Ledger`."""
        return list(self.store.read(self).standing.events)

    def reserve(self, event: PrivacyEvent, *, planned: int) -> float:
        """See `Ledger`."""
        return self.store.reserve(self, event, planned)

    def opening(self) -> Record:
        """The first record."""
        return opening(
            ledger=secrets.token_hex(16),
            budget=self.opening_budget,
            unit=self.unit,
            simulated=True,
            names=[self.name],
            fingerprints=[],
        )
