"""The file in which a simulated run keeps the ledgers of all its clients: SQLite, and how it is read.

A table holds the lines of every ledger, chained as in a site's own file; another, as its counter, how many there are
and the last one's hash. Both are in one file, so this tells damage from what was written but not an older copy: nothing
real is protected by it. Only simulations write it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import Chain, read_chain
from common.privacy.ledger.standing import Protected, Standing

STORE = "ledgers.db"
"""Its name in a run's folder."""

SCHEMA = """
PRAGMA user_version = 1;
PRAGMA application_id = 0x636F7465;
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ledger TEXT NOT NULL, number INTEGER NOT NULL, line BLOB NOT NULL,
    UNIQUE (ledger, number)
) STRICT;
CREATE TABLE heads (ledger TEXT PRIMARY KEY, count INTEGER NOT NULL, head TEXT NOT NULL) STRICT;
"""
_APPLICATION = 0x636F7465


@dataclass(slots=True)
class Replay:
    """One ledger of a store, as far as it was read."""

    chain: Chain
    standing: Standing

    @classmethod
    def new(cls, budget: Budget, unit: Protected) -> Replay:
        """A ledger without records."""
        return cls(Chain(), Standing(budget=budget, unit=unit))

    def read(self, lines: bytes, *, where: str) -> None:
        """Go on with the lines that follow.

        Raises:
            LedgerError: One of them is damaged, or of a ledger that is not simulated. The replay is of no use then.
        """
        self.chain = read_chain(lines, self.chain, self.standing.add)
        problem = self.chain.problem or ("its last line is cut off" if self.chain.tail else "")
        if not problem and self.chain.records and not self.standing.simulated:
            problem = "it is the ledger of a real site"
        if problem:
            raise untrusted(where, problem)

    def check_head(self, count: int, head: str, *, where: str) -> None:
        """Raise LedgerError unless these are the number of lines and the last one's hash."""
        if (len(self.chain.records), self.chain.head) != (count, head):
            raise untrusted(where, f"it holds {len(self.chain.records)} records that are not the {count} written")


def read_store(path: Path) -> dict[str, Replay]:
    """All ledgers of a store by name.

    Raises:
        LedgerError: The file is no store, cannot be read, or is damaged.
    """
    with store_errors(path):
        if not path.is_file():
            raise LedgerError(f"{path} is not there", hint="name the folder of a private run")
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            check_store(connection, path)
            connection.execute("BEGIN")
            lines: dict[str, list[bytes]] = {}
            for ledger, line in connection.execute("SELECT ledger, line FROM records ORDER BY ledger, number"):
                lines.setdefault(ledger, []).append(line)
            heads = {name: (count, head) for name, count, head in connection.execute("SELECT * FROM heads")}
    replays = {}
    for name in sorted({*lines, *heads}):
        place = where(path, name)
        replay = Replay.new(Budget(epsilon=1.0, delta=0.5, order=2), "example")  # the first record says which
        replay.read(b"".join(lines.get(name, [])), where=place)
        replay.check_head(*heads.get(name, (0, "")), where=place)
        replays[name] = replay
    return replays


def check_store(connection: sqlite3.Connection, path: Path) -> None:
    """Raise LedgerError where a database is not a store of this version."""
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if (application, version) != (_APPLICATION, 1):
        raise LedgerError(f"{path} holds no simulated ledgers of this version", hint="written by another program?")


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """What SQLite or the operating system refuses, as a LedgerError that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError, OverflowError) as e:
        raise LedgerError(f"{path}: {e}", hint="nothing was trained; check the file and the disk") from e


def where(path: Path, name: str) -> str:
    """What messages call a ledger of a store."""
    return f"{path}, ledger {name}"


def untrusted(where: str, problem: str) -> LedgerError:
    """What is said of a ledger that is damaged."""
    return LedgerError(f"{where} cannot be trusted: {problem}", hint="start a new run in another folder")
