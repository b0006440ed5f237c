"""Ledgers with equal histories share their arithmetic, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.events import PrivacyEvent
from common.privacy.ledger.history import History
from common.privacy.ledger.standing import Standing, event_record, opening
from tests.helpers.events import matrix, non_private, sampled, shared
from tests.helpers.ledgers import ROOMY, room_for

EVENTS: list[PrivacyEvent] = [
    *(sampled(r) for r in (1, 2, 3)),
    sampled(1, noise=5.0, run="s"),
    *(matrix(run="m", server_round=r) for r in (1, 3, 9)),
    shared(4, noise=20.0, run="u"),
    non_private(),
]
courses = st.lists(st.sampled_from(EVENTS), max_size=5)


def opened(name: str = "icu", budget: Budget = ROOMY, **fields: Any) -> dict[str, Any]:
    record = opening(ledger="l" + name, budget=budget, unit="example", simulated=True, names=[name], fingerprints=[])
    return record | fields


def told(answer: Any) -> Any:
    """What a call returns, or why it refuses."""
    try:
        return answer()
    except BudgetExhaustedError as e:
        return str(e), e.hint


class TestAgainstStanding:
    """A history answers what a replay of its records does."""

    @given(st.lists(courses, min_size=1, max_size=4), st.sampled_from(EVENTS), st.integers(1, 4), st.booleans())
    def test_it_admits_and_counts_as_a_replay_does(
        self, ledgers: list[list[PrivacyEvent]], event: PrivacyEvent, planned: int, free: bool
    ) -> None:
        """Whatever other ledgers went the same way before, at different rounds."""
        budget = room_for([sampled()] * 3)
        root = History(ROOMY, "example")
        for name, events in enumerate(ledgers):
            records = [opened(str(name), budget), *map(event_record, events)]
            history = root
            for record in records:
                history = history.then({**record, "number": 7, "previous": name})
            replay = Standing(records, budget=ROOMY)
            assert history.spent() == replay.spent
            assert history.spent(ROOMY) == spent(events, budget=ROOMY, unit="client")
            assert len(history.standing.events) == len(events)
            for _ in range(2):
                assert told(lambda h=history: h.admit(event, planned=planned, allow_non_private=free)) == told(
                    lambda s=replay: s.admit(event, planned=planned, allow_non_private=free)
                )

    def test_a_schedule_is_checked_for_each_round(self) -> None:
        """What was said of one round of correlated noise is not said of another."""
        history = History(ROOMY, "example").then(opened()).then(event_record(matrix(server_round=1)))
        assert history.admit(matrix(server_round=9), planned=2, allow_non_private=False) > 0
        with pytest.raises(BudgetExhaustedError, match="sooner than it planned"):
            history.admit(matrix(server_round=3), planned=2, allow_non_private=False)


class TestSharing:
    """Which records count as equal."""

    def test_ledgers_that_differ_in_name_and_rounds_share_one(self) -> None:
        """A thousand clients cost what one does."""
        root = History(ROOMY, "example")
        one = root.then(opened("a")).then(event_record(sampled(1))).then(event_record(sampled(4)))
        other = root.then(opened("b")).then(event_record(sampled(3))).then(event_record(sampled(9)))
        assert one is other

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (sampled(1), sampled(1, noise=3.0)),
            (sampled(1, steps=1), sampled(1, steps=2)),
            (sampled(1), sampled(1, run="s")),
            (matrix(server_round=1), matrix(server_round=2)),
            (shared(1), shared(2)),
        ],
    )
    def test_whatever_can_matter_keeps_them_apart(self, one: PrivacyEvent, other: PrivacyEvent) -> None:
        """Noise, steps, run; and the rounds of events whose schedule is checked."""
        root = History(ROOMY, "example").then(opened())
        assert root.then(event_record(one)) is not root.then(event_record(other))

    def test_budgets_keep_them_apart(self) -> None:
        """A ledger of another ceiling is another history."""
        root = History(ROOMY, "example")
        assert root.then(opened()) is not root.then(opened(budget=Budget.opened(3.0, 1e-5)))


class TestDamage:
    """What a replay refuses is refused, also where an equal sound record was read before."""

    @pytest.mark.parametrize(
        "change",
        [
            {"server_round": 0}, {"server_round": True}, {"server_round": "1"}, {"server_round": 1.0},
            {"steps": True}, {"steps": 1.0}, {"sampling_rate": True}, {"version": True}, {"extra": 1},
        ],
        ids=str,
    )  # fmt: skip
    def test_an_event_that_only_looks_equal(self, change: dict[str, Any]) -> None:
        """True is 1 to Python; to a ledger it is damage."""
        root = History(ROOMY, "example").then(opened())
        record = event_record(sampled(1))
        root.then(record)
        with pytest.raises(LedgerError):
            root.then({**record, "event": {**record["event"], **change}})

    @pytest.mark.parametrize(
        "change",
        [
            {"ledger": ""}, {"ledger": None}, {"ledger": 3}, {"names": "icu"}, {"names": [3]}, {"fingerprints": [""]},
            {"version": 9}, {"unit": "family"}, {"format": "other"},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_first_record_that_is_wrong(self, change: dict[str, Any]) -> None:
        """Also in what no history depends on."""
        root = History(ROOMY, "example")
        root.then(opened())
        with pytest.raises(LedgerError):
            root.then(opened(**change))
        with pytest.raises(LedgerError):
            root.then({name: value for name, value in opened().items() if name not in change})

    @pytest.mark.parametrize("record", [{}, {"record": "else"}, {"record": "event"}, {"record": "event", "event": []}])
    def test_what_is_no_record(self, record: dict[str, Any]) -> None:
        """Nothing is skipped."""
        with pytest.raises(LedgerError):
            History(ROOMY, "example").then(opened()).then(record)
