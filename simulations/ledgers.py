"""Ledgers of simulated clients: one SQLite file a run, written by all of its processes. They never touch a site's."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CoterieError, LedgerError, PrivacyError
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent
from common.privacy.ledger.chain import Record
from common.privacy.ledger.simulated import SCHEMA, Replay, check_store, store_errors, where
from common.privacy.ledger.standing import Protected, event_record, opening
from simulations.courses import Course, Courses

COORDINATOR = "@coordinator"
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
        return SimulatedLedger(self, COORDINATOR, budget, "client")

    def exists(self) -> bool:
        """Whether anything was reserved."""
        return self.path.exists()

    def spent(self, clients: Iterable[str], *, budget: Budget | None = None) -> dict[str, float]:
        """Epsilon spent of each client's examples. Only ledgers of these clients are read.

        Args:
            clients: Their names.
            budget: Where given, what was spent of each client's whole data instead, at this budget's delta and order.

        Raises:
            LedgerError: The file cannot be read, or one of the ledgers is damaged.
        """
        return {name: course.history.spent(budget) for name, course in self._read(clients).items()}

    def taken(self, clients: Iterable[str]) -> dict[str, int]:
        """How many events each client's ledger has.

        Raises:
            LedgerError: As `spent`.
        """
        return {name: len(course.history.standing.events) for name, course in self._read(clients).items()}

    def reserve_many(
        self, clients: Iterable[str], event: PrivacyEvent, *, planned: int
    ) -> dict[str, CoterieError | None]:
        """Reserve the same event in the ledger of each client, in one transaction; see `Ledger.reserve`.

        Returns:
            By name, None where the event was written, or why this client's ledger does not take it: its budget is
            exhausted, or it is damaged. The others go on.

        Guarantee: When this returns, all events that were written survive a crash.

        Raises:
            LedgerError: The file cannot be read or written; nothing was.
        """
        answers = self._reserve([self.of(name) for name in dict.fromkeys(clients)], event, planned)
        return {name: answer if isinstance(answer, CoterieError) else None for name, answer in answers.items()}

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
        self._courses = Courses(self.path)

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
            except BaseException:
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

    def _read(self, clients: Iterable[str]) -> dict[str, Course]:
        """Where these clients' ledgers stand; raises LedgerError where one of them is damaged."""
        ledgers = [self.of(name) for name in clients]
        with self._reading() as connection:
            if connection is None:
                return {ledger.name: self._courses.begun(ledger) for ledger in ledgers}
            found = self._courses.current(connection, ledgers)
        for course in found.values():
            if isinstance(course, LedgerError):
                raise course
        courses = {name: course for name, course in found.items() if isinstance(course, Course)}
        self._courses.remember(courses)
        return courses

    def read(self, ledger: SimulatedLedger) -> Replay:
        """All that one ledger holds."""
        replay, place = Replay.new(ledger.opening_budget, ledger.unit), where(self.path, ledger.name)
        with self._reading() as connection:
            if connection is not None:
                rows = connection.execute("SELECT line FROM records WHERE ledger = ? ORDER BY number", (ledger.name,))
                replay.read(b"".join(line for (line,) in rows), where=place)
                head = connection.execute("SELECT count, head FROM heads WHERE ledger = ?", (ledger.name,)).fetchone()
                if head is not None or replay.chain.records:
                    replay.check_head(*(head or (0, "")), where=place)
        return replay

    def reserve(self, ledger: SimulatedLedger, event: PrivacyEvent, planned: int) -> float:
        """See `Ledger.reserve`."""
        answer = self._reserve([ledger], event, planned)[ledger.name]
        if isinstance(answer, CoterieError):
            raise answer
        return answer

    def _reserve(
        self, ledgers: Sequence[SimulatedLedger], event: PrivacyEvent, planned: int
    ) -> dict[str, float | CoterieError]:
        """Epsilon spent including the event, by name, or why a ledger does not take it."""
        event.check()
        entry = event_record(event)
        answers: dict[str, float | CoterieError] = {}
        written: dict[str, Course] = {}
        with self._transaction("BEGIN IMMEDIATE") as connection:
            lines: list[tuple[str, int, bytes]] = []
            found = self._courses.current(connection, ledgers)
            for ledger in ledgers:
                name, course = ledger.name, found[ledger.name]
                if isinstance(course, LedgerError):
                    answers[name] = course
                    continue
                try:
                    answers[name] = course.history.admit(
                        event, planned=planned, allow_non_private=self.allow_non_private
                    )
                except PrivacyError as e:
                    answers[name] = e
                    continue
                for record in (entry,) if course.mark[0] else (ledger.opening(), entry):
                    number = course.mark[0]
                    course, line = course.with_record(record)
                    lines.append((name, number, line))
                written[name] = course
            # A line that is there already, of a ledger whose head was lost, ends the transaction.
            connection.executemany("INSERT INTO records (ledger, number, line) VALUES (?, ?, ?)", lines)
            heads = [(name, *course.mark) for name, course in written.items()]
            connection.executemany("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", heads)
        self._courses.remember(written)  # only what is in the file
        return answers


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
