"""What every ledger must do, as tests that each kind of ledger runs on itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from common.errors import BudgetExhaustedError, LedgerError, PrivacyError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.ledger import Ledger
from tests.helpers.events import matrix, non_private, sampled, shared

ROOMY = Budget(epsilon=1e6, delta=1e-5, order=8)


def room_for(events: list, order: int = 8) -> Budget:
    """A budget that these events spend to the last bit."""
    return Budget(epsilon=spent(events, budget=Budget(epsilon=1.0, delta=1e-5, order=order)), delta=1e-5, order=order)


class LedgerContract:
    """Subclasses have a fixture `open_ledger`: a function of `budget` and `allow_non_private` that opens the same
    ledger each time.
    """

    def test_a_new_ledger_is_empty(self, open_ledger):
        """And has the budget that it was opened with."""
        ledger: Ledger = open_ledger(ROOMY)
        assert ledger.events() == []
        assert ledger.budget == ROOMY

    def test_events_are_kept_in_their_order(self, open_ledger):
        """Also for whoever opens the ledger next."""
        events = [sampled(1), sampled(2, run="s"), matrix(run="m"), sampled(3, noise=5.0, distance=1e-9, run="t")]
        events += [shared(4, noise=20.0, run="u"), shared(4, noise=20.0, mechanism="discrete-gaussian", run="v")]
        for event in events:
            open_ledger(ROOMY).reserve(event, planned=9)
        assert open_ledger(ROOMY).events() == events

    def test_it_answers_what_is_spent_with_the_new_event(self, open_ledger):
        """By the gate."""
        ledger = open_ledger(ROOMY)
        assert ledger.reserve(sampled(1), planned=2) == spent([sampled()], budget=ROOMY)
        assert ledger.reserve(sampled(2), planned=2) == spent([sampled()] * 2, budget=ROOMY)

    def test_a_budget_can_be_spent_to_the_last_bit(self, open_ledger):
        """Noise that was calibrated for it lasts to the last round."""
        budget = room_for([sampled()] * 3)
        costs = [open_ledger(budget).reserve(sampled(r), planned=3) for r in (1, 2, 3)]
        assert costs[-1] == budget.epsilon

    def test_a_round_that_would_overspend_is_refused(self, open_ledger):
        """It is not written, and what is left can still be spent by something smaller."""
        ledger = open_ledger(room_for([sampled()] * 2))
        ledger.reserve(sampled(1), planned=2)
        with pytest.raises(BudgetExhaustedError) as caught:
            ledger.reserve(sampled(2, noise=1.0, run="another"), planned=1)
        assert "administrator" in caught.value.hint
        assert ledger.events() == [sampled(1)]
        ledger.reserve(sampled(2), planned=2)

    def test_a_run_whose_plan_exceeds_what_is_left_is_refused_before_its_first_round(self, open_ledger):
        """Rather than stopped in its middle; the same round fits as part of a shorter run."""
        ledger = open_ledger(room_for([sampled()] * 3))
        with pytest.raises(BudgetExhaustedError, match="whole run"):
            ledger.reserve(sampled(1), planned=4)
        assert ledger.events() == []
        ledger.reserve(sampled(1), planned=3)

    def test_a_run_has_no_more_events_than_it_planned(self, open_ledger):
        """However much is left; another run has its own."""
        ledger = open_ledger(ROOMY)
        for r in (1, 2):
            ledger.reserve(sampled(r), planned=2)
        with pytest.raises(BudgetExhaustedError, match="planned 2"):
            ledger.reserve(sampled(3), planned=2)
        ledger.reserve(sampled(1, run="another"), planned=2)
        assert len(ledger.events()) == 3

    @pytest.mark.parametrize(
        ("first", "later"),
        [
            (sampled(1), sampled(2, noise=2.0000001)),
            (sampled(1), sampled(2, noise=1.9)),
            (sampled(1), sampled(2, rate=0.5)),
            (sampled(1), sampled(2, steps=2)),
            (sampled(1), matrix(server_round=6)),
            (matrix(), matrix(server_round=6, participations=3)),
            (matrix(), matrix(server_round=6, min_separation=4)),
            (matrix(), sampled(6)),
            (shared(), shared(2, l2_squared=999_999, variance=4_000_000)),
            (shared(), shared(2, shares=3)),
            (shared(), shared(2, mechanism="discrete-gaussian")),
            (shared(), sampled(2, unit="client", trust="coordinator")),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_run_keeps_to_what_it_first_said(self, open_ledger, first, later):
        """A plan a request, each of which keeps the run's target, would together spend more than it; more noise, too.
        Whoever opens the ledger next knows it still.
        """
        open_ledger(ROOMY).reserve(first, planned=1)
        with pytest.raises(BudgetExhaustedError, match="first one"):
            open_ledger(ROOMY).reserve(later, planned=9)
        assert open_ledger(ROOMY).events() == [first]
        open_ledger(ROOMY).reserve(replace(first, server_round=6), planned=2)

    def test_another_run_spends_of_the_same_budget(self, open_ledger):
        """Of any coordinator, with any mechanism."""
        ledger = open_ledger(room_for([sampled()] * 3))
        ledger.reserve(sampled(1), planned=2)
        with pytest.raises(BudgetExhaustedError, match="whole run"):
            ledger.reserve(sampled(1, run="another"), planned=3)
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(sampled(1, unit="client", run="another"), planned=1)

    def test_a_release_that_covers_a_run_is_paid_once(self, open_ledger):
        """Each participation is written, all cost what one does; another run is another release."""
        ledger = open_ledger(ROOMY)
        first = ledger.reserve(matrix(server_round=1), planned=2)
        assert ledger.reserve(matrix(server_round=6), planned=2) == first
        assert ledger.events() == [matrix(server_round=1), matrix(server_round=6)]
        assert ledger.reserve(matrix(run="again"), planned=2) > first

    @pytest.mark.parametrize("server_round", [1, 2, 5])
    def test_a_run_that_asks_again_sooner_than_it_planned_is_refused(self, open_ledger, server_round):
        """Its sensitivity was worked out for its schedule; the same round again is another release."""
        ledger = open_ledger(ROOMY)
        ledger.reserve(matrix(server_round=1), planned=2)
        with pytest.raises(BudgetExhaustedError, match="sooner than it planned"):
            ledger.reserve(matrix(server_round=server_round), planned=2)
        assert ledger.events() == [matrix(server_round=1)]

    def test_sums_with_distributed_noise_add_up_over_rounds(self, open_ledger):
        """Each is a release of its own, at the ledger's order; for an example at a site twice as far."""
        ledger = open_ledger(room_for([shared(steps=3)]))
        told = [ledger.reserve(shared(r), planned=3) for r in (1, 2, 3)]
        assert told[-1] == ledger.budget.epsilon
        assert told == [spent([shared(steps=r)], budget=ledger.budget) for r in (1, 2, 3)]
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(shared(4, run="another"), planned=1)

    def test_a_run_that_asks_more_often_than_it_planned_is_refused(self, open_ledger):
        """Also where all participations cost what one does."""
        ledger = open_ledger(ROOMY)
        for server_round in (1, 6):
            ledger.reserve(matrix(server_round=server_round), planned=2)
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(matrix(server_round=11), planned=2)

    def test_a_release_that_covers_a_run_needs_room_for_one(self, open_ledger):
        """Not for one a round."""
        budget = room_for([matrix()])
        assert open_ledger(budget).reserve(matrix(), planned=2) == budget.epsilon

    def test_no_budget_has_room_for_a_release_without_noise(self, open_ledger):
        """Unless the site permits it."""
        ledger = open_ledger(ROOMY)
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(non_private(), planned=9)
        assert ledger.events() == []

    def test_where_the_site_permits_it_a_release_without_noise_is_written(self, open_ledger):
        """From then on epsilon is infinite, and only a site that permits that goes on."""
        ledger = open_ledger(ROOMY, allow_non_private=True)
        assert ledger.reserve(non_private(), planned=9) == math.inf
        assert ledger.reserve(sampled(2, run="s"), planned=9) == math.inf
        with pytest.raises(BudgetExhaustedError):
            open_ledger(ROOMY).reserve(sampled(3, run="s"), planned=9)

    @pytest.mark.parametrize(
        "fields",
        [{"noise": math.inf}, {"noise": math.nan}, {"steps": 0}, {"rate": 1.5}, {"run": 7}, {"distance": 1.0}],
        ids=str,
    )  # fmt: skip
    def test_an_event_that_could_not_be_read_again_is_not_written(self, open_ledger, fields):
        """One bad request must not make a ledger unreadable for good."""
        ledger = open_ledger(ROOMY)
        ledger.reserve(sampled(1), planned=9)
        with pytest.raises(LedgerError):
            ledger.reserve(sampled(2, **fields), planned=9)
        assert ledger.events() == [sampled(1)]

    @pytest.mark.parametrize(
        "event",
        [shared(variance=2.5), shared(l1=1 << 101), shared(trust="nobody"), shared(granularity=math.nan)],
        ids=lambda event: repr(event)[-60:],
    )
    def test_nor_one_of_a_sum(self, open_ledger, event):
        """Its values are whole numbers, and its trust is what it is."""
        with pytest.raises(LedgerError):
            open_ledger(ROOMY).reserve(event, planned=9)
        assert open_ledger(ROOMY).events() == []

    def test_an_event_that_cannot_be_computed_is_not_written(self, open_ledger):
        """Where squares overflow."""
        ledger = open_ledger(ROOMY)
        with pytest.raises(PrivacyError):
            ledger.reserve(sampled(noise=1e200), planned=1)
        assert ledger.events() == []

    def test_the_budget_is_the_one_that_the_ledger_opened_with(self, open_ledger):
        """Opening it again with another one changes nothing: only an explicit decision does."""
        small = room_for([sampled()])
        open_ledger(small).reserve(sampled(1), planned=1)
        assert open_ledger(ROOMY).budget == small
        with pytest.raises(BudgetExhaustedError):
            open_ledger(ROOMY).reserve(sampled(1, run="another"), planned=1)

    def test_two_who_have_it_open_see_each_others_events(self, open_ledger):
        """Neither spends what the other has spent."""
        budget = room_for([sampled()] * 2)
        one, two = open_ledger(budget), open_ledger(budget)
        one.reserve(sampled(1), planned=2)
        two.reserve(sampled(2), planned=2)
        assert one.events() == two.events() == [sampled(1), sampled(2)]
        with pytest.raises(BudgetExhaustedError):
            one.reserve(sampled(1, run="another"), planned=1)
