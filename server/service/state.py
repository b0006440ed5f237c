"""The queue of runs and what became of each: what a restarted service goes on from.

One SQLite file in write-ahead mode; every change is on the disk before the call returns. A run's rounds, checkpoints
and result are in its own folder, not here.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from common.errors import RunError

Status = Literal["queued", "running", "stopping", "completed", "stopped", "failed"]
ENDED: Final[frozenset[Status]] = frozenset({"completed", "stopped", "failed"})

_VERSION: Final = 1
_PATIENCE_SECONDS: Final = 30.0
_SCHEMA: Final = """
CREATE TABLE runs (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    operator TEXT NOT NULL,
    config TEXT NOT NULL,
    config_digest TEXT NOT NULL,
    authorization TEXT NOT NULL,
    sites TEXT NOT NULL,
    rounds INTEGER NOT NULL,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    submitted TEXT NOT NULL,
    started TEXT,
    finished TEXT,
    problem TEXT
) STRICT;
CREATE TABLE audit_head (one INTEGER PRIMARY KEY CHECK (one = 1), lines INTEGER NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TABLE audit_damage (at TEXT NOT NULL, problem TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One submitted run.

    Attributes:
        run_id: 32 hexadecimal digits, chosen by the operator's machine.
        name: The configuration's `name`.
        operator: Who submitted it.
        config: The configuration as canonical JSON.
        config_digest: Its digest, in hex.
        authorization: What the operator signed.
        sites: Names of the sites that take part, sorted; fixed when the run is submitted.
        rounds: How many the configuration has.
        status: Where it stands.
        attempt: How often it was started: one more after each restart of the service.
        submitted, started, finished: ISO times in UTC; None before.
        problem: Why it failed, as an error document; None otherwise.
        position: Its place in the queue, over all runs ever.
    """

    run_id: str
    name: str
    operator: str
    config: str
    config_digest: str
    authorization: str
    sites: tuple[str, ...]
    rounds: int
    status: Status = "queued"
    attempt: int = 0
    submitted: str = ""
    started: str | None = None
    finished: str | None = None
    problem: Mapping[str, Any] | None = None
    position: int = 0


def now() -> str:
    """The time in UTC, in the form in which it is kept."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class ServiceState:
    """The service's one SQLite file. Safe with several threads; one process writes it.

    Args:
        path: The file; made with its tables where it is not there.
        reading: Open it to read only, beside the service that writes it.

    Raises:
        RunError: It cannot be opened, is damaged, or was written by another version.
    """

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        self.path = path
        self._mutex = threading.RLock()
        if reading and not path.is_file():
            raise RunError(f"there is no {path}", hint="`coterie server` makes it when it first starts")
        with self._errors():
            mode = f"{path.absolute().as_uri()}?mode={'ro' if reading else 'rwc'}"
            self._connection = sqlite3.connect(
                mode, uri=True, timeout=_PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            if not reading:
                path.chmod(0o600)
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._make_tables()
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found != _VERSION:
            self.close()
            raise RunError(f"{path} was written by another version", hint="start the version that wrote it")

    def _make_tables(self) -> None:
        with self._transaction() as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                for statement in _SCHEMA.strip().rstrip(";").split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def add(self, run: Run) -> Run:
        """Put a run at the end of the queue; the run as it is kept.

        Guarantee: when this returns, the run survives a crash. The same submission again is the same run: it is not
        queued twice.

        Raises:
            RunError: Another run has this id.
        """
        with self._transaction() as connection:
            known = self._row(connection, run.run_id)
            if known is not None:
                if (known.authorization, known.config) != (run.authorization, run.config):
                    raise RunError(f"another run has the id {run.run_id}", hint="submit it anew: it gets another id")
                return known
            connection.execute(
                "INSERT INTO runs (run_id, name, operator, config, config_digest, authorization, sites, rounds, status,"
                " submitted) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?)",
                (
                    run.run_id,
                    run.name,
                    run.operator,
                    run.config,
                    run.config_digest,
                    run.authorization,
                    json.dumps(run.sites),
                    run.rounds,
                    now(),
                ),
            )
            return self._existing(connection, run.run_id)

    def runs(self, *statuses: Status) -> list[Run]:
        """Runs in the order of the queue; only those of these statuses, if any are named."""
        with self._mutex, self._errors():
            rows = self._connection.execute("SELECT * FROM runs ORDER BY position").fetchall()
        return [run for run in map(_run, rows) if not statuses or run.status in statuses]

    def run(self, run_id: str) -> Run | None:
        """The run of that id."""
        with self._mutex, self._errors():
            return self._row(self._connection, run_id)

    def begin(self, run_id: str) -> Run:
        """Note that a run is being carried out, once more; the run with its new attempt."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET status = 'running', attempt = attempt + 1, started = coalesce(started, ?)"
                " WHERE run_id = ?",
                (now(), run_id),
            )
            return self._existing(connection, run_id)

    def end(self, run_id: str, status: Status, problem: Mapping[str, Any] | None = None) -> Run:
        """Note what became of a run."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET status = ?, finished = ?, problem = ? WHERE run_id = ?",
                (status, now(), None if problem is None else json.dumps(problem), run_id),
            )
            return self._existing(connection, run_id)

    def ask_to_stop(self, run_id: str) -> Run:
        """Note that a run shall end: at once where it only waits, else as soon as it can; a restart remembers it."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET status = 'stopped', finished = ? WHERE run_id = ? AND status = 'queued'",
                (now(), run_id),
            )
            connection.execute("UPDATE runs SET status = 'stopping' WHERE run_id = ? AND status = 'running'", (run_id,))
            return self._existing(connection, run_id)

    def audit_head(self) -> tuple[int, str] | None:
        """How many lines the audit log had when it was last secured, and the hash of the last; None before the first.

        Raises:
            RunError: The file cannot be read.
        """
        with self._mutex, self._errors():
            row = self._connection.execute("SELECT lines, hash FROM audit_head").fetchone()
        return None if row is None else (row["lines"], row["hash"])

    def set_audit_head(self, lines: int, digest: str) -> None:
        """Note how far the audit log goes."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO audit_head VALUES (1, ?, ?)", (lines, digest))

    def audit_damage(self) -> list[str]:
        """What was found wrong with the audit log at a start, oldest first."""
        with self._mutex, self._errors():
            rows = self._connection.execute("SELECT problem FROM audit_damage ORDER BY at").fetchall()
        return [row["problem"] for row in rows]

    def add_audit_damage(self, problem: str) -> None:
        """Note that the audit log was found damaged: the lines that follow would hide it."""
        with self._transaction() as connection:
            connection.execute("INSERT INTO audit_damage VALUES (?, ?)", (now(), problem))

    def _row(self, connection: sqlite3.Connection, run_id: str) -> Run | None:
        row = connection.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return None if row is None else _run(row)

    def _existing(self, connection: sqlite3.Connection, run_id: str) -> Run:
        run = self._row(connection, run_id)
        if run is None:
            raise RunError(f"there is no run {run_id}", hint="`coterie runs --kit KIT` lists them")
        return run

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise RunError(f"{self.path} cannot be used: {e}", hint="check the disk; is it full?") from e


def find_run(runs: Sequence[Run], wanted: str) -> Run:
    """The run that an operator means: its id, a beginning of it that no other has, its name if no other has it, or
    `latest`.

    Raises:
        RunError: There is none, or more than one.
    """
    import difflib

    if not runs:
        raise RunError("there are no runs yet", hint="`coterie submit` queues one")
    if wanted == "latest":
        return max(runs, key=lambda run: run.position)
    exact = [run for run in runs if run.run_id == wanted]
    begun = exact or [run for run in runs if wanted and run.run_id.startswith(wanted)]
    found = begun or [run for run in runs if run.name == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(
            f"`{wanted}` means {len(found)} runs", hint=f"one of: {', '.join(run.run_id[:12] for run in found[:5])}"
        )
    known = {run.run_id[:12]: run for run in runs} | {run.name: run for run in runs}
    near = difflib.get_close_matches(wanted[:12], known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "`coterie runs --kit KIT` lists them"
    raise RunError(f"there is no run `{wanted}`", hint=hint)


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    values["sites"] = tuple(json.loads(values["sites"]))
    values["problem"] = None if values["problem"] is None else json.loads(values["problem"])
    return Run(**values)
