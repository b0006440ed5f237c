"""What ledgers with equal histories share, so that it is worked out once for all of them.

Thousands of simulated clients have ledgers that differ in their name and in the rounds that they took part in only.
What a ledger's next event may be, and what was spent, is a pure function of its records; this module keeps it by them.
Every ledger's own lines are still read, and its own chain verified: only the arithmetic is shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent, SampledGaussian
from common.privacy.ledger.chain import Record
from common.privacy.ledger.standing import Protected, Standing, texts

_LINK = ("number", "previous")
"""Fields of a line that are its chain's."""

_OWN = ("ledger", "names", "fingerprints")
"""Fields of a ledger's first record that nothing is counted by."""


class History:
    """Records, from the first to the last, of all ledgers that have equal ones.

    Records count as equal where they differ in the ledger's own name, or in the round of a `SampledGaussian`: what such
    an event costs, and whether it is admitted, does not depend on its round. The rounds of all other events do count.

    Args:
        budget: In force until the first record says otherwise.
        unit: Likewise.

    Guarantee: a history never changes, but for what it remembers of its own arithmetic.
    """

    __slots__ = ("_admitted", "_begin", "_next", "_records", "_spent", "standing")

    def __init__(self, budget: Budget, unit: Protected, records: tuple[Record, ...] = ()) -> None:
        """Replay the records; raises LedgerError as `Standing.add` does."""
        self.standing = Standing(records, budget=budget, unit=unit)
        self._begin = (budget, unit)
        self._records = records
        self._next: dict[str, History] = {}
        self._admitted: dict[tuple[PrivacyEvent, int, bool], float | BudgetExhaustedError] = {}
        self._spent: dict[Budget | None, float] = {}

    def then(self, record: Record) -> History:
        """The history with one record more.

        Args:
            record: With or without the fields of its line's chain.

        Raises:
            LedgerError: It is unknown or has impossible values.
        """
        same = {name: value for name, value in record.items() if name not in _LINK}
        kind, event = record.get("record"), record.get("event")
        if kind == "opened":
            _check_own(record)
            same = {name: value for name, value in same.items() if name not in _OWN}
        elif kind == "event" and isinstance(event, dict) and event.get("kind") == SampledGaussian.KIND:
            same["event"] = {**event, "server_round": _round(event.get("server_round"))}
        key = repr(same)  # not the values themselves: True, 1 and 1.0 are equal, and only one of them may be right
        known = self._next.get(key)
        if known is None:
            known = self._next[key] = History(*self._begin, records=(*self._records, record))
        return known

    def admit(self, event: PrivacyEvent, *, planned: int, allow_non_private: bool) -> float:
        """See `Standing.admit`."""
        same = replace(event, server_round=1) if isinstance(event, SampledGaussian) else event
        key = (same, planned, allow_non_private)
        if key not in self._admitted:
            try:
                found: float | BudgetExhaustedError = self.standing.admit(
                    event, planned=planned, allow_non_private=allow_non_private
                )
            except BudgetExhaustedError as e:
                found = BudgetExhaustedError(str(e), hint=e.hint)  # without its trace
            self._admitted[key] = found
        told = self._admitted[key]
        if isinstance(told, BudgetExhaustedError):
            raise BudgetExhaustedError(str(told), hint=told.hint)
        return told

    def spent(self, budget: Budget | None = None) -> float:
        """What was spent: of the history's own unit; with a budget, of whole clients, at its delta and order."""
        if budget not in self._spent:
            standing = self.standing
            self._spent[budget] = (
                standing.spent if budget is None else spent(standing.events, budget=budget, unit="client")
            )
        return self._spent[budget]


def _round(value: Any) -> int:
    """Any round, in place of one that is a round."""
    if type(value) is not int or value < 1:
        raise LedgerError("a privacy event has impossible values", hint="the ledger was edited or damaged")
    return 1


def _check_own(record: Record) -> None:
    """What `Standing` asks of a first record's own fields."""
    try:
        if not texts([record["ledger"]]):
            raise TypeError
        texts(record["names"])
        texts(record["fingerprints"])
    except (KeyError, TypeError) as e:
        raise LedgerError("a record (opened) has wrong fields", hint="the ledger was edited or damaged") from e
