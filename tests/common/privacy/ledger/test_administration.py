"""What a site's administrator decides where a ledger cannot be trusted, and what that leaves on record."""

import pytest

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.ledger import FileLedger
from common.privacy.ledger.administration import accept, findings
from tests.helpers.events import non_private, sampled
from tests.helpers.ledger_processes import file_ledger
from tests.helpers.ledgers import ROOMY, room_for

BUDGET = Budget(epsilon=10.0, delta=1e-5, order=8)


@pytest.fixture
def ledger(tmp_path):
    """A ledger with three events."""
    ledger = file_ledger(tmp_path, BUDGET)
    for r in (1, 2, 3):
        ledger.reserve(sampled(r, noise=10.0), planned=9)
    return ledger


def cut(ledger, lines=1):
    """Take the last lines away; what is left, and what there was."""
    whole = ledger.path.read_bytes()
    left = b"".join(whole.splitlines(keepends=True)[:-lines])
    ledger.path.write_bytes(left)
    return left, whole


class TestFindings:
    """What is wrong, before anything is decided."""

    def test_of_a_sound_ledger_there_is_nothing_to_say(self, ledger):
        """And nothing to accept."""
        assert findings(ledger)["problem"] == ""
        with pytest.raises(LedgerError, match="nothing to decide"):
            accept(ledger, assume="nothing-lost")

    def test_they_say_what_was_expected_and_what_is_there(self, ledger):
        """As counts and hashes."""
        cut(ledger)
        found = findings(ledger)
        assert found["expected"]["records"] == 4
        assert found["found"]["records"] == 3
        assert found["found"]["bytes"] == len(ledger.path.read_bytes())


class TestAccept:
    """The ledger goes on from the lines that can be trusted."""

    def test_by_default_what_is_lost_had_spent_the_budget(self, ledger):
        """Nothing fits any more, by the gate itself."""
        cut(ledger)
        accept(ledger, assume="spent")
        again = file_ledger(ledger.path.parent.parent)
        assert again.standing().spent > BUDGET.epsilon
        assert again.standing().spent == pytest.approx(BUDGET.epsilon, rel=1e-9)
        with pytest.raises(BudgetExhaustedError):
            again.reserve(sampled(4, noise=1e6), planned=9)

    def test_what_the_budget_is_raised_by_can_then_be_spent(self, ledger):
        """And no more: the lost part is not given back."""
        cut(ledger)
        accept(ledger, assume="spent")
        ledger.set_budget(Budget(epsilon=11.0, delta=1e-5, order=8))
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(sampled(1, run="s", noise=1.7), planned=1)  # fits 11, does not fit 1
        ledger.reserve(sampled(1, run="s", noise=2.1), planned=1)

    def test_or_nothing_was_lost(self, ledger):
        """Where the administrator says so."""
        cut(ledger)
        accept(ledger, assume="nothing-lost")
        assert ledger.events() == [sampled(r, noise=10.0) for r in (1, 2)]
        ledger.reserve(sampled(3, noise=10.0), planned=3)

    def test_the_decision_stays_on_record(self, ledger):
        """What was wrong, expected, found, assumed and kept."""
        cut(ledger)
        decision = accept(ledger, assume="nothing-lost")
        ledger.reserve(sampled(3, noise=10.0), planned=9)
        (kept,) = file_ledger(ledger.path.parent.parent).standing().decisions
        assert {key: kept[key] for key in decision} == decision
        assert (kept["assumed"], kept["expected"]["records"], kept["found"]["records"]) == ("nothing-lost", 4, 3)

    def test_nothing_is_deleted(self, ledger):
        """Each time, what was found is kept beside under another name."""
        for number in (1, 2):
            left, _ = cut(ledger)
            counter = ledger.counter.read_bytes()
            decision = accept(ledger, assume="nothing-lost")
            assert decision["kept"] == [f"icu.jsonl.damaged-{number}", f"icu.json.damaged-{number}"]
            assert ledger.path.with_name(f"icu.jsonl.damaged-{number}").read_bytes() == left
            assert ledger.counter.with_name(f"icu.json.damaged-{number}").read_bytes() == counter

    @pytest.mark.parametrize("assume", ["spent", "nothing-lost"])
    def test_an_edited_line_counts_as_it_reads_and_all_after_it_is_left_out(self, ledger, assume):
        """Which of two lines that do not fit was edited nobody knows; the first one costs more than none."""
        ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"server_round":2', b'"server_round":8'))
        accept(ledger, assume=assume)
        assert ledger.events()[:2] == [sampled(r, noise=10.0) for r in (1, 8)]
        assert len(ledger.events()) == (3 if assume == "spent" else 2)

    def test_a_budget_that_somebody_wrote_into_it_does_not_count(self, ledger):
        """The counter tells what was in force."""
        ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"epsilon":10.0', b'"epsilon":99.0'))
        accept(ledger, assume="nothing-lost")
        assert ledger.budget == BUDGET

    def test_lines_that_a_restored_counter_does_not_know_are_counted(self, ledger):
        """All of the ledger is sound; the counter is set anew."""
        old = ledger.counter.read_bytes()
        for r in (4, 5):
            ledger.reserve(sampled(r, noise=10.0), planned=9)
        ledger.counter.write_bytes(old)
        accept(ledger, assume="nothing-lost")
        assert len(ledger.events()) == 5

    def test_a_missing_ledger_begins_anew_with_the_budget_that_its_counter_tells(self, ledger):
        """Under the same name, assumed spent."""
        ledger.path.unlink()
        accept(file_ledger(ledger.path.parent.parent, ROOMY), assume="spent")
        assert ledger.budget == BUDGET
        assert ledger.standing().names == {"icu"}
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(sampled(noise=1e6), planned=1)

    def test_a_budget_that_was_raised_in_the_lost_part_counts_as_spent_too(self, ledger):
        """The counter knows what was in force."""
        raised = Budget(epsilon=20.0, delta=1e-5, order=8)
        ledger.set_budget(raised)
        cut(ledger)
        accept(ledger, assume="spent")
        assert ledger.budget == raised
        assert ledger.standing().spent > 20.0

    def test_where_no_budget_is_known_it_must_be_said(self, ledger):
        """Neither ledger nor counter."""
        ledger.path.write_bytes(b"garbage\n")
        ledger.counter.write_bytes(b"garbage")
        with pytest.raises(LedgerError) as caught:
            accept(ledger, assume="spent")
        assert "--epsilon" in caught.value.hint
        accept(ledger, assume="spent", budget=BUDGET)
        assert (ledger.budget, len(ledger.events())) == (BUDGET, 1)

    def test_what_was_infinite_stays_infinite(self, tmp_path):
        """Nothing needs to be added."""
        ledger = FileLedger(
            tmp_path / "icu.jsonl", counter=tmp_path / "i" / "icu.json", budget=BUDGET, allow_non_private=True
        )
        ledger.reserve(non_private(1), planned=2)
        ledger.reserve(sampled(2, run="s"), planned=2)
        cut(ledger)
        accept(ledger, assume="spent")
        assert ledger.events() == [non_private(1)]


class TestFilling:
    """The event that stands for what cannot be read."""

    @pytest.mark.parametrize("order", [4, 8, 64])
    def test_it_brings_what_is_spent_just_above_the_budget(self, tmp_path, order):
        """Whatever the order."""
        budget = Budget(epsilon=10.0, delta=1e-6, order=order)
        ledger = file_ledger(tmp_path, budget)
        ledger.reserve(sampled(noise=20.0), planned=1)
        event = ledger.standing().filling()
        total = spent([sampled(noise=20.0), event], budget=budget)
        assert budget.epsilon < total < budget.epsilon * (1 + 1e-6)

    def test_where_the_budget_is_spent_to_the_last_bit_it_is_tiny(self, tmp_path):
        """There is still no room beside it."""
        ledger = file_ledger(tmp_path, room_for([sampled()]))
        ledger.reserve(sampled(), planned=1)
        assert ledger.standing().filling().noise_multiplier > 1e3
