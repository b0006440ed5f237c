"""What simulated clients keep from round to round, in one file for all of them, so that a stopped run goes on exactly.

A client's `Context.state` (the norm that it clips to, what compression left out, its member of a sum) is a row for each
round that changed it. Rows of the last rounds stay, so that a run which takes up an older checkpoint finds what every
client had then. Only the process that drives the run opens the file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common.errors import FailureCode, RunError
from server.job import Observer, RoundRecord

STATES: Final = "states.db"
"""Its name in a run's folder."""

KEPT_ROUNDS: Final = 3
"""A run can go on with any of so many last rounds; checkpoints go back by fewer."""

_APPLICATION: Final = 0x636F7473
_SCHEMA: Final = f"""
PRAGMA user_version = 1;
PRAGMA application_id = {_APPLICATION};
CREATE TABLE states (
    client INTEGER NOT NULL, round INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (client, round)
) STRICT, WITHOUT ROWID;
"""


class ClientStates:
    """States by client and round. A run whose clients keep nothing never makes the file.

    Args:
        path: The file; None takes one of SQLite's own temporary ones, which ends with `close`.

    Guarantee: after `begin(r)`, `read` gives what a client had when round r began for the first time, for any r of the
    last `KEPT_ROUNDS` rounds and the one that comes next. What `settle` was called after survives a power cut.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._round = 0
        self._unsettled = False

    def begin(self, server_round: int) -> None:
        """A round begins: what was written in it or later, by a process that was stopped, is gone.

        Raises:
            RunError: The file cannot be read or written.
        """
        self._round = server_round
        with self._using(make=False) as connection:
            if connection is not None:
                connection.execute("DELETE FROM states WHERE round >= ?", (server_round,))

    def read(self, client: int) -> bytes | None:
        """A client's state as it was last written, or None.

        Args:
            client: The client's partition.

        Raises:
            RunError: The file cannot be read.
        """
        with self._using(make=False) as connection:
            if connection is None:
                return None
            row = connection.execute(
                "SELECT content FROM states WHERE client = ? ORDER BY round DESC LIMIT 1", (client,)
            ).fetchone()
            return None if row is None else bytes(row[0])

    def write(self, client: int, content: bytes) -> None:
        """Keep a client's state, in the round that began last.

        Raises:
            RunError: The file cannot be written.
        """
        oldest = self._round - KEPT_ROUNDS + 1  # a round that can begin again
        with self._using(make=True) as connection:
            if connection is not None:
                connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", (client, self._round, content))
                connection.execute(
                    "DELETE FROM states WHERE client = ?1 AND round < "
                    "(SELECT max(round) FROM states WHERE client = ?1 AND round < ?2)",
                    (client, oldest),
                )
                self._unsettled = True

    def settle(self) -> None:
        """Wait until everything is on the disk: a checkpoint that counts on it comes next.

        Raises:
            RunError: The file cannot be written.
        """
        if not self._unsettled or self._path is None:
            return
        with self._using(make=False) as connection:
            if connection is not None:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._unsettled = False

    def close(self) -> None:
        """Let go of the file; what a temporary one held is gone."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        """Python 3.13 warns of connections that were left open."""
        self.close()

    @contextmanager
    def _using(self, *, make: bool) -> Iterator[sqlite3.Connection | None]:
        """The connection; None where there is no file and none is to be made."""
        try:
            if self._connection is None and (make or (self._path is not None and self._path.exists())):
                self._connection = self._connect()
            yield self._connection
        except (sqlite3.Error, OSError, OverflowError) as e:
            where = "the clients' states" if self._path is None else str(self._path)
            raise RunError(f"{where}: {e}", hint="check the disk; a damaged file needs a new run") from e

    def _connect(self) -> sqlite3.Connection:
        if self._path is not None:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(self._path or "", isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute("COMMIT")
            (application,), (version,) = (
                connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
            )
            if (application, version) != (_APPLICATION, 1):
                raise RunError(f"{self._path} holds no states of this version", hint="written by another program?")
        except BaseException:
            connection.close()
            raise
        return connection


class StateRounds(Observer):
    """Tells the store of states of every round."""

    def __init__(self, states: ClientStates) -> None:
        self._states = states

    def round_started(self, server_round: int, cohort: list[str]) -> None:  # noqa: ARG002 - see `Observer`
        """See `Observer`."""
        self._states.begin(server_round)

    def update_received(self, client: str) -> None:
        """See `Observer`."""

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """See `Observer`."""

    def round_finished(self, record: RoundRecord) -> None:  # noqa: ARG002 - see `Observer`
        """See `Observer`; the round's checkpoint is written after this."""
        self._states.settle()
