"""Where the ledgers of a store stand: each one's last line, and the history that its lines tell."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from common.errors import LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import START, Record, line_hash, linked_line, linked_record
from common.privacy.ledger.history import History
from common.privacy.ledger.simulated import untrusted, where
from common.privacy.ledger.standing import Protected

_NAMES_AT_A_TIME: Final = 500
"""In one query."""

MOST_KNOWN: Final = 1 << 14
"""Ledgers that a process remembers, a few hundred bytes each; a run's population can be far larger."""

Mark = tuple[int, str]
"""How many lines a ledger has, and the last one's hash."""

UNMARKED: Mark = (0, START)
"""A ledger without lines."""


@dataclass(frozen=True, slots=True)
class Course:
    """A ledger as far as it was read.

    Attributes:
        mark: Of its last line.
        history: What its lines tell; shared by all ledgers that tell the same.
    """

    mark: Mark
    history: History

    def after(self, line: bytes) -> Course:
        """The ledger with one more line, read from the store.

        Raises:
            LedgerError: It does not continue the chain, or cannot be read; or it is not of a simulated ledger.
        """
        number, previous = self.mark
        content, newline = line[:-1], line[-1:]
        try:
            if newline != b"\n" or b"\n" in content:
                raise LedgerError("is cut off")
            history = self.history.then(linked_record(content, number=number, previous=previous))
        except LedgerError as e:
            raise LedgerError(f"line {number + 1}: {e}") from e
        if not history.standing.simulated:
            raise LedgerError("it is the ledger of a real site")
        return Course((number + 1, line_hash(content)), history)

    def with_record(self, record: Record) -> tuple[Course, bytes]:
        """The ledger with one more record, and the line that says so."""
        number, previous = self.mark
        line = linked_line(record, number=number, previous=previous)
        return Course((number + 1, line_hash(line[:-1])), self.history.then(record)), line


class Named(Protocol):
    """A ledger of a store: its name there, and what it is opened with."""

    @property
    def name(self) -> str: ...  # noqa: D102 - above
    @property
    def opening_budget(self) -> Budget: ...  # noqa: D102 - above
    @property
    def unit(self) -> Protected: ...  # noqa: D102 - above


class Courses:
    """What one process knows of a store's ledgers.

    Args:
        path: The store's file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Course] = {}
        self._histories: dict[tuple[Budget, Protected], History] = {}

    def begun(self, ledger: Named) -> Course:
        """A ledger without lines."""
        key = (ledger.opening_budget, ledger.unit)
        if key not in self._histories:
            self._histories[key] = History(*key)
        return Course(UNMARKED, self._histories[key])

    def current(self, connection: sqlite3.Connection, ledgers: Sequence[Named]) -> dict[str, Course | LedgerError]:
        """Where ledgers stand, in their order, or what is wrong with one; of those known only what was added is read.

        Guarantee: every line is verified once by whoever counts on it, and the last one against the ledger's head.
        """
        names = [ledger.name for ledger in ledgers]
        heads = _rows(connection, "ledger, count, head FROM heads", names)
        marks = {name: (count, head) for name, count, head in heads}
        begun = {ledger.name: self._known.get(ledger.name) or self.begun(ledger) for ledger in ledgers}
        new = [name for name in names if begun[name].mark == UNMARKED]
        lines: dict[str, list[bytes]] = {name: [] for name in new}
        for name, line in _rows(connection, "ledger, line FROM records", new, "ORDER BY ledger, number"):
            lines[name].append(line)
        found: dict[str, Course | LedgerError] = {}
        for name in names:
            course, mark = begun[name], marks.get(name, UNMARKED)
            if name not in lines and course.mark != mark:
                rows = connection.execute(
                    "SELECT line FROM records WHERE ledger = ? AND number >= ? ORDER BY number", (name, course.mark[0])
                )
                lines[name] = [line for (line,) in rows]
            try:
                for line in lines.get(name, ()):
                    course = course.after(line)
                if course.mark != mark:
                    raise LedgerError(f"it holds {course.mark[0]} records that are not the {mark[0]} written")
                found[name] = course
            except LedgerError as e:
                self._known.pop(name, None)
                found[name] = untrusted(where(self._path, name), str(e))
        return found

    def remember(self, courses: Mapping[str, Course]) -> None:
        """Keep where ledgers stand, as the file says; of very many, only of those that were used last."""
        if len(self._known) + len(courses) > MOST_KNOWN:
            self._known.clear()
            self._histories.clear()
        self._known.update(courses)


def _rows(
    connection: sqlite3.Connection, what: str, names: Sequence[str], order: str = ""
) -> Iterator[tuple[Any, ...]]:
    """Rows of a table of ledgers, of those with these names."""
    for begin in range(0, len(names), _NAMES_AT_A_TIME):
        some = names[begin : begin + _NAMES_AT_A_TIME]
        places = ",".join("?" * len(some))
        yield from connection.execute(f"SELECT {what} WHERE ledger IN ({places}) {order}", some)
