"""The append-only record of privacy events: written and flushed to disk before the first noisy step."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Protocol

from common.disk import sync
from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accountant import spent_epsilon
from common.privacy.events import PoissonGaussian, PrivacyEvent, check_event, event_from_dict, event_to_dict


class Ledger(Protocol):
    """Where a client keeps its privacy events."""

    def events(self) -> list[PrivacyEvent]:
        """All events so far, oldest first."""

    def reserve(self, event: PrivacyEvent, *, budget: tuple[float, float]) -> float:
        """Write `event` durably if it stays within `budget` (epsilon, delta); the epsilon spent including it.

        Guarantee: When this returns, the event survives a crash. It is never taken back: a crash afterwards costs
        budget, not privacy.

        Raises:
            BudgetExhaustedError: The event would overspend. Nothing was written.
            LedgerError: The ledger cannot be read or written. Nothing may be released.
        """


class FileLedger:
    """One client's events as JSON lines in one file, locked while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self) -> list[PrivacyEvent]:
        """All events so far, oldest first.

        Raises:
            LedgerError: A line is damaged, unknown or cut off. Nothing is skipped: what cannot be read cannot be
            counted.
        """
        try:
            return _parse(self._path.read_bytes(), self._path)
        except FileNotFoundError:
            return []
        except OSError as e:
            raise _cannot(self._path, e) from e

    def reserve(self, event: PrivacyEvent, *, budget: tuple[float, float]) -> float:
        """See `Ledger.reserve`."""
        epsilon, delta = budget
        if isinstance(event, PoissonGaussian):
            check_event(event)  # once written, it would make the whole ledger unreadable
        line = json.dumps(event_to_dict(event), sort_keys=True).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                written = file.read()
                spent = spent_epsilon([*_parse(written, self._path), event], delta=delta)
                if spent > epsilon:
                    raise BudgetExhaustedError(
                        f"this round would bring the spent epsilon to {spent:.4g}, above {epsilon:.4g}",
                        hint="the site goes on without this run; only its administrator can raise the budget",
                    )
                if file.write(line) != len(line):
                    file.truncate(len(written))  # half an event would make the ledger unreadable for good
                    raise LedgerError(f"{self._path}: the disk is full", hint="free space; nothing was trained")
                os.fsync(file.fileno())
                if not written:
                    sync(self._path.parent)
        except OSError as e:
            raise _cannot(self._path, e) from e
        return spent


def _parse(data: bytes, path: Path) -> list[PrivacyEvent]:
    if data and not data.endswith(b"\n"):
        raise LedgerError(
            f"{path}: the last event is cut off", hint="restore the file, or start a new data set's ledger"
        )
    try:
        return [event_from_dict(json.loads(line)) for line in data.splitlines()]
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise LedgerError(f"{path} is damaged", hint="restore the file; a damaged ledger cannot be counted") from e


def _cannot(path: Path, error: OSError) -> LedgerError:
    return LedgerError(f"{path}: {error.strerror}", hint="nothing was trained; mend the file system and try again")
