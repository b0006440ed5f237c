"""Where a ledger stands: what its records say of its budget and of what was spent, and whether an event still fits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Literal

from common.errors import BudgetExhaustedError, LedgerError, PrivacyError
from common.privacy.accounting.accountant import spent_of
from common.privacy.accounting.budget import Budget
from common.privacy.accounting.renyi import epsilon_at
from common.privacy.accounting.tally import Tally
from common.privacy.events import (
    MatrixGaussian,
    NonPrivate,
    PrivacyEvent,
    SampledGaussian,
    Unit,
    event_from_dict,
    event_to_dict,
)
from common.privacy.ledger.chain import Record

FORMAT, VERSION = "coterie-ledger", 1

Protected = Literal["example", "entity", "client"]
"""Whom a ledger's budget protects: each row of a data set, each entity (patient, user), or each client."""

_PROTECTED = ("example", "entity", "client")


def opening(
    *, ledger: str, budget: Budget, unit: Protected, simulated: bool, names: Iterable[str], fingerprints: Iterable[str]
) -> Record:
    """A ledger's first record."""
    return {
        "record": "opened",
        "format": FORMAT,
        "version": VERSION,
        "ledger": ledger,
        "unit": unit,
        "simulated": simulated,
        "names": sorted(names),
        "fingerprints": sorted(fingerprints),
        "budget": asdict(budget),
    }


def event_record(event: PrivacyEvent) -> Record:
    """The record of one event."""
    return {"record": "event", "event": event_to_dict(event)}


class Standing:
    """A replay of a ledger's records.

    Attributes:
        ledger: The ledger's own name, drawn at random when it was opened; empty before.
        unit: Whom the budget protects.
        budget: The ceiling now.
        simulated: Whether nothing real was ever released.
        names: Names that the data set had.
        fingerprints: Salted fingerprints that its content had.
        events: All events, oldest first.
        decisions: Records of what an administrator accepted.
    """

    def __init__(self, records: Iterable[Record] = (), *, budget: Budget, unit: Protected = "example") -> None:
        self.ledger = ""
        self.unit: Protected = unit
        self.budget = budget
        self.simulated = False
        self.names: set[str] = set()
        self.fingerprints: set[str] = set()
        self.events: list[PrivacyEvent] = []
        self.decisions: list[Record] = []
        self._tally = Tally(unit=self.counted)
        self._of_run: Counter[str] = Counter()
        self._first: dict[str, PrivacyEvent] = {}
        for record in records:
            self.add(record)

    @property
    def counted(self) -> Unit:
        """The unit for which events are read: an entity is an example of a data set that has entities."""
        return "client" if self.unit == "client" else "example"

    @property
    def spent(self) -> float:
        """Epsilon spent, by the gate."""
        return spent_of(self._tally, self.budget)

    @property
    def share(self) -> float:
        """What is used of all that fits, from 0; above 1 where it is more.

        Epsilon does not tell: at a fixed order the first release, however small, costs log(1/delta)/(order - 1), and
        the rest grows in proportion to what is released.
        """
        if self._tally.empty:
            return 0.0
        entry = epsilon_at(self.budget.order, 0.0, self.budget.delta)
        room = self.budget.epsilon - entry
        return (self.spent - entry) / room if room > 0 else math.inf

    def add(self, record: Record) -> None:
        """Take in one more record.

        Raises:
            LedgerError: It is unknown or has impossible values. Nothing is skipped: what is not understood cannot be
            counted.
        """
        kind = record.get("record")
        if (kind == "opened") == bool(self.ledger):
            raise LedgerError("a ledger is opened once, by its first record", hint="the ledger was edited or damaged")
        try:
            if kind == "opened":
                self._open(record)
            elif kind == "event":
                event = event_from_dict(record["event"])
                self._tally.add(event)
                self._of_run[event.run] += 1
                self._first.setdefault(event.run, event)
                self.events.append(event)
            elif kind == "budget":
                self.budget = Budget(**record["budget"])
            elif kind == "identity":
                names, fingerprints = texts(record["names"]), texts(record["fingerprints"])
                self.names.update(names)
                self.fingerprints.update(fingerprints)
            elif kind == "accepted":
                self.decisions.append(record)
            else:
                raise LedgerError(f"unknown record {kind!r}", hint="written by another version of Coterie?")
        except LedgerError:
            raise
        except (PrivacyError, KeyError, TypeError, AttributeError, ValueError) as e:
            raise LedgerError(f"a record ({kind}) has wrong fields", hint="the ledger was edited or damaged") from e

    def admit(self, event: PrivacyEvent, *, planned: int, allow_non_private: bool = False) -> float:
        """Epsilon spent once `event` is added, if it may be.

        Guarantee: All events of a run added so are alike but for their round, and each is one of `planned`. So the
        plan from which the last one came, which keeps the run's target for that many of them, covers all of them.

        Raises:
            BudgetExhaustedError: It may not.
            PrivacyError: It is unknown, impossible, or cannot be computed with.
        """
        tally = self._tally.plus(event)
        if isinstance(event, NonPrivate):
            if not allow_non_private:
                raise _refused("a release without noise fits no budget", hint="set a privacy unit for the run")
            return math.inf
        before = self._of_run[event.run]
        if before >= planned:
            raise _refused(f"the run planned {planned} private rounds at this site and has had them")
        # Each request brings its own plan: plans that fit one by one, for other participations, would not together.
        if before and replace(self._first[event.run], server_round=event.server_round) != event:
            raise _refused("this round has other noise or another schedule than the run's first one")
        if self._tally.infinite and allow_non_private:
            return math.inf
        if isinstance(event, MatrixGaussian):
            self._check_schedule(event)
        if before == 0 and (whole := spent_of(self._tally.plus(event, planned), self.budget)) > self.budget.epsilon:
            raise _refused(
                f"the whole run would bring the spent epsilon to {whole:.4g}, above {self.budget.epsilon:.4g}"
            )
        after = spent_of(tally, self.budget)
        if after > self.budget.epsilon:
            raise _refused(f"this round would bring the spent epsilon to {after:.4g}, above {self.budget.epsilon:.4g}")
        return after

    def _check_schedule(self, event: MatrixGaussian) -> None:
        """What a whole run costs follows from how soon a unit takes part again: an earlier round is another run."""
        apart = 1 if self.unit == "client" else event.min_separation  # other clients take part in between
        rounds = [e.server_round for e in self.events if isinstance(e, MatrixGaussian) and e.run == event.run]
        if any(abs(taken - event.server_round) < apart for taken in rounds):
            raise _refused(f"round {event.server_round} of the run comes sooner than it planned, or a second time")

    def filling(self) -> PrivacyEvent | None:
        """An event that brings what is spent just above the budget; None where it is there already.

        It stands for history that cannot be read: that kept to the budget, whatever it was.
        """
        if self.spent > self.budget.epsilon:
            return None
        low, high = 1e-6, 1e6
        for _ in range(200):
            middle = math.sqrt(low * high)
            if middle in {low, high}:
                break
            above = spent_of(self._tally.plus(_filler(middle, self.counted)), self.budget) > self.budget.epsilon
            low, high = (middle, high) if above else (low, middle)
        return _filler(low, self.counted)

    def _open(self, record: Record) -> None:
        if record.get("format") != FORMAT or record.get("version") != VERSION or record.get("unit") not in _PROTECTED:
            raise LedgerError("not a ledger of this version", hint="written by another version of Coterie?")
        self.budget = Budget(**record["budget"])
        self.unit = record["unit"]
        self.simulated = record["simulated"] is not False
        self.names = set(texts(record["names"]))
        self.fingerprints = set(texts(record["fingerprints"]))
        self.ledger = texts([record["ledger"]])[0]
        self._tally = Tally(unit=self.counted)


def _filler(noise_multiplier: float, unit: Unit) -> SampledGaussian:
    return SampledGaussian(
        unit=unit,
        trust="nobody",
        clipping_norm=1.0,
        sensitivity=1.0,
        noise_stddev=noise_multiplier,
        count_noise_stddev=None,
        sampling_rate=1.0,
        steps=1,
        distance=0.0,
        run="unreadable history",
        server_round=1,
    )


def _refused(
    message: str, hint: str = "the site goes on without this run; only its administrator can raise the budget"
) -> BudgetExhaustedError:
    return BudgetExhaustedError(message, hint=hint)


def texts(values: Any) -> list[str]:
    """The values, which are a list of texts that are not empty.

    Raises:
        TypeError: They are not.
    """
    if type(values) is not list or any(type(value) is not str or not value for value in values):
        raise TypeError
    return values
