"""The append-only record of privacy events, on disk before the first noisy step: one file a data set.

A reservation takes the lock, verifies the whole chain against the counter, asks the budget, writes the next counter to
a temporary file, appends one line, flushes it, and puts the counter in place. Killed at any step, the file holds at
least what was ever returned: one line more than the counter says is a reservation that may have been returned, and it
counts; a line that was never finished was not, and is cut off. Everything else waits for the site's administrator
(`administration`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from common.disk import sync
from common.errors import LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent
from common.privacy.ledger.chain import START, Record, line_after, read_chain
from common.privacy.ledger.counter import Counter, commit_counter, prepare_counter
from common.privacy.ledger.found import Found, look
from common.privacy.ledger.standing import Protected, Standing, event_record, opening


class Ledger(Protocol):
    """Where the events of one data set are kept, over all runs and coordinators."""

    @property
    def budget(self) -> Budget:
        """The ceiling over everything in the ledger."""

    def events(self) -> list[PrivacyEvent]:
        """All events so far, oldest first.

        Raises:
            LedgerError: The ledger cannot be trusted or read.
        """

    def reserve(self, event: PrivacyEvent, *, planned: int) -> float:
        """Write `event` durably if the budget allows it; the epsilon spent including it.

        The `MatrixGaussian` events of one run cost what one of them does.

        Args:
            event: What is about to be released.
            planned: Most events of `event.run` at this data set.

        Guarantee: When this returns, the event survives a crash. It is never taken back: a crash afterwards costs
        budget, not privacy.

        Raises:
            BudgetExhaustedError: The run has had its `planned` events; or this one is unlike its first in more than the
                round; or it is the first and all of them together would overspend; or this one would. Nothing was
                written.
            LedgerError: The ledger cannot be trusted, read or written. Nothing may be released.
        """


class FileLedger:
    """A ledger as JSON lines in one file, and its counter in another.

    Args:
        path: The ledger. Its stem is the name by which the administrator knows it.
        counter: The counter, in another folder.
        budget: Ceiling with which a new ledger opens. One that exists keeps its own; `set_budget` changes it.
        unit: Whom the budget protects; None takes `example` for a new ledger and anything for one that exists.
        names: Names of the data set, for a new ledger.
        fingerprints: Salted fingerprints of its content, for a new ledger.
        allow_non_private: Whether the site permits releases without noise. From the first on epsilon is infinite.
    """

    def __init__(
        self,
        path: Path,
        *,
        counter: Path,
        budget: Budget,
        unit: Protected | None = None,
        names: Iterable[str] = (),
        fingerprints: Iterable[str] = (),
        allow_non_private: bool = False,
    ) -> None:
        self.path = path
        self.counter = counter
        self._opening = budget
        self._unit = unit
        self._names = tuple(names) or (path.stem,)
        self._fingerprints = tuple(fingerprints)
        self._allow_non_private = allow_non_private
        self._threads = threading.RLock()
        self._found: Found | None = None  # what was verified before: only what was appended since is parsed again

    @property
    def name(self) -> str:
        """The name by which the administrator knows it."""
        return self.path.stem

    @property
    def budget(self) -> Budget:
        """See `Ledger`."""
        return self.standing().budget

    def events(self) -> list[PrivacyEvent]:
        """See `Ledger`."""
        return list(self.standing().events)

    def records(self) -> list[Record]:
        """All records, oldest first. Raises LedgerError as `events`."""
        with self.locked(writing=False):
            return list(self._verified().chain.records)

    def standing(self) -> Standing:
        """Where the ledger stands; to be read, not changed. A ledger that was never opened is empty.

        Raises:
            LedgerError: The ledger cannot be trusted or read.
        """
        with self.locked(writing=False):
            return self._verified().standing

    def reserve(self, event: PrivacyEvent, *, planned: int) -> float:
        """See `Ledger`."""
        event.check()  # once written, it would make the whole ledger unreadable
        with self.locked():
            found = self._verified(repair=True)
            spent = found.standing.admit(event, planned=planned, allow_non_private=self._allow_non_private)
            self._append(found, event_record(event))
            return spent

    def set_budget(self, budget: Budget) -> None:
        """Change the ceiling. Only the site's administrator does that. Raises LedgerError as `events`."""
        with self.locked():
            self._append(self._verified(repair=True), {"record": "budget", "budget": asdict(budget)})

    def identify(self, *, names: Iterable[str], fingerprints: Iterable[str]) -> None:
        """Record by what else the data set is known; nothing is written where it is known by all of it. A new ledger is
        opened. Raises LedgerError as `events`.
        """
        with self.locked():
            found = self._verified(repair=True)
            added = {
                "names": sorted(set(names) - found.standing.names),
                "fingerprints": sorted(set(fingerprints) - found.standing.fingerprints),
            }
            if not found.standing.ledger:
                self._open(found)
            elif any(added.values()):
                self._append(found, {"record": "identity", **added})

    @contextmanager
    def locked(self, *, writing: bool = True) -> Iterator[None]:
        """Hold the ledger's lock; what the operating system refuses within is a LedgerError."""
        lock_file = self.path.with_name(f".{self.path.name}.lock")
        lock: int | None = None
        with self._threads, ledger_errors(self.path):
            if writing:
                for folder in (self.path.parent, self.counter.parent):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
            else:
                lock = _existing(lock_file)
            try:
                if lock is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX if writing else fcntl.LOCK_SH)
                yield
            finally:
                if lock is not None:
                    os.close(lock)

    def look(self, before: Found | None = None) -> Found:
        """What is on the disk, sound or not. The caller holds the lock.

        Raises:
            OSError: It cannot be read.
        """
        return look(self.path, self.counter, new=self._new(), before=before)

    def opening(self, ledger: str, budget: Budget) -> Record:
        """The first record of a ledger."""
        return opening(
            ledger=ledger,
            budget=budget,
            unit=self._unit or "example",
            simulated=False,
            names=self._names,
            fingerprints=self._fingerprints,
        )

    def _new(self) -> Standing:
        return Standing(budget=self._opening, unit=self._unit or "example")

    def _verified(self, *, repair: bool = False) -> Found:
        """What is on the disk, if it can be trusted; with `repair`, what a crash left is finished: a line that was
        never ended is cut off, one that was is counted.
        """
        before, self._found = self._found, None
        found = self.look(before)
        if found.problem:
            raise LedgerError(
                f"{self.path} cannot be trusted: {found.problem}",
                hint=f"nothing was trained; put the right file back, or decide: `coterie ledger accept {self.name}`",
            )
        if self._unit not in {None, found.standing.unit}:
            raise LedgerError(
                f"{self.path} counts each {found.standing.unit}, the data set now each {self._unit}",
                hint="what was released protects no other unit: register the data as it was",
            )
        if repair and found.chain.tail:
            os.truncate(self.path, found.chain.size)
            found = replace(found, chain=replace(found.chain, tail=b""))
        if repair and found.pending:
            commit_counter(prepare_counter(self.counter, found.next_counter()), self.counter)
            found = replace(found, counter=found.next_counter())
        self._found = replace(found, data=(found.data or b"")[: found.chain.size])
        return found

    def _append(self, found: Found, record: Record) -> None:
        """Write one record after those that were verified, under the lock; a new ledger is opened first."""
        self._write(found if found.chain.records else self._open(found), record)

    def _open(self, found: Found) -> Found:
        """Write the first record. The counter comes first, at zero: a ledger without one is never what a crash left."""
        counter = found.counter
        if counter is None:
            counter = Counter(ledger=secrets.token_hex(16), count=0, head=START, budget=self._opening)
            commit_counter(prepare_counter(self.counter, counter), self.counter)
        return self._write(replace(found, counter=counter), self.opening(counter.ledger, self._opening))

    def _write(self, found: Found, record: Record) -> Found:
        """Write one line, then its counter. An error leaves what was there before, or a line that counts."""
        self._found = None
        line = line_after(found.chain, {**record, "time": now()})
        chain = read_chain(line, found.chain, found.standing.add)
        if chain.problem:
            raise LedgerError(f"{self.path}: a record would not be understood", hint="report this as a bug")
        found = replace(found, data=(found.data or b"") + line, chain=chain)
        found = replace(found, counter=found.next_counter())
        temporary = prepare_counter(self.counter, found.next_counter())
        try:
            _append_line(self.path, line, size=chain.size - len(line))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        commit_counter(temporary, self.counter)
        self._found = found
        return found


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as a LedgerError that says what to do."""
    try:
        yield
    except OSError as e:
        full = e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise LedgerError(
            f"{e.filename or path}: {e.strerror or e}",
            hint=f"nothing was trained; {'free space' if full else 'mend the file system'} and try again",
        ) from e


def now() -> str:
    """The time for people to read. Nothing compares it: clocks change."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append_line(path: Path, line: bytes, *, size: int) -> None:
    """Append a line to a file of `size` bytes and wait until it is on the disk; an error leaves the file as it was."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        written = 0
        while written < len(line):  # a disk that is nearly full takes a part
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    finally:
        os.close(descriptor)
    if size == 0:
        sync(path.parent)


def _existing(lock_file: Path) -> int | None:
    """A descriptor of a lock file; None where there is none, or none that may be opened: nothing writes there."""
    try:
        return os.open(lock_file, os.O_RDONLY)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
