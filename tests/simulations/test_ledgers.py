"""Ledgers of simulated clients: the same contract as a site's, in one file a run, and never a site's."""

import pickle
import sqlite3
from contextlib import closing

import pytest

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accounting.accountant import spent
from common.privacy.accounting.budget import Budget
from common.privacy.ledger import FileLedger
from common.privacy.ledger.simulated import STORE, read_store
from simulations.ledgers import SimulatedLedgers
from tests.helpers.events import sampled
from tests.helpers.ledgers import ROOMY, LedgerContract, room_for


@pytest.fixture
def path(tmp_path):
    """Where the store is."""
    return tmp_path / "run" / STORE


@pytest.fixture
def ledgers(path):
    """A store with two ledgers: three events, and one."""
    ledgers = SimulatedLedgers(path, ROOMY)
    for r in (1, 2, 3):
        ledgers.of("a").reserve(sampled(r), planned=9)
    ledgers.of("b").reserve(sampled(1), planned=9)
    ledgers.close()
    return ledgers


def damage(path, *statements):
    """Change the file behind the store's back."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0
        connection.commit()


class TestContract(LedgerContract):
    """What every ledger must do."""

    @pytest.fixture
    def open_ledger(self, path):
        """Each time a store of its own, on the same file."""

        def open_ledger(budget, *, allow_non_private=False):
            return SimulatedLedgers(path, budget, allow_non_private=allow_non_private).of("icu")

        return open_ledger


class TestStore:
    """Many ledgers in one file."""

    def test_each_client_has_its_own(self, ledgers):
        """One's events are not another's."""
        assert ledgers.of("a").events() == [sampled(r) for r in (1, 2, 3)]
        assert ledgers.of("b").events() == [sampled(1)]

    def test_looking_makes_no_file(self, path):
        """Whoever was never asked has spent nothing."""
        ledgers = SimulatedLedgers(path, ROOMY)
        assert (ledgers.of("a").events(), ledgers.spent(["a", "b"])) == ([], {"a": 0.0, "b": 0.0})
        assert not ledgers.exists()
        assert list(path.parent.parent.iterdir()) == []

    def test_what_all_have_spent_is_told_at_once(self, ledgers, path):
        """By the gate, each time as it is now, whoever wrote."""
        other = SimulatedLedgers(path, ROOMY)
        for expected in (1, 2, 3):
            one = spent([sampled()] * expected, budget=ROOMY)
            assert ledgers.spent(["b", "c"]) == {"b": one, "c": 0.0}
            other.of("b").reserve(sampled(expected + 1), planned=9)
        assert other.spent(["a"]) == {"a": spent([sampled()] * 3, budget=ROOMY)}

    def test_the_coordinator_has_a_ledger_that_counts_clients(self, ledgers):
        """With a budget of its own."""
        budget = room_for([sampled()])
        own = ledgers.coordinator(budget)
        assert own.reserve(sampled(unit="client", trust="coordinator"), planned=1) == budget.epsilon
        assert own.budget == budget
        assert ledgers.spent(["a"]) == {"a": spent([sampled()] * 3, budget=ROOMY)}

    def test_a_refusal_forgets_nothing(self, path):
        """Neither of the one who was refused nor of the others."""
        ledgers = SimulatedLedgers(path, room_for([sampled()] * 2))
        for name in ("a", "b"):
            ledgers.of(name).reserve(sampled(1), planned=2)
        with pytest.raises(Exception, match="whole run"):
            ledgers.of("a").reserve(sampled(1, run="s"), planned=2)
        ledgers.of("a").reserve(sampled(2), planned=2)
        assert len(ledgers.of("a").events()) == 2

    def test_it_can_be_sent_to_another_process(self, ledgers):
        """Settings travel, connections do not."""
        copy = pickle.loads(pickle.dumps(ledgers))  # noqa: S301 - our own
        copy.of("a").reserve(sampled(4), planned=9)
        assert len(ledgers.of("a").events()) == 4

    def test_it_can_be_used_from_several_threads(self, ledgers):
        """One after the other."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: ledgers.of("t").reserve(sampled(i), planned=99), range(1, 41)))
        assert len(ledgers.of("t").events()) == 40

    def test_reports_read_it_without_writing(self, ledgers, path):
        """Every ledger, verified, and marked as simulated."""
        before = path.read_bytes()
        replays = read_store(path)
        assert {name: len(replay.standing.events) for name, replay in replays.items()} == {"a": 3, "b": 1}
        assert all(replay.standing.simulated for replay in replays.values())
        assert replays["a"].standing.budget == ROOMY
        assert path.read_bytes() == before


class TestMany:
    """The same event in many ledgers at once."""

    def test_each_ledger_is_as_if_it_had_reserved_alone(self, tmp_path):
        """Its events, its chain and what it answers later."""
        together, alone = (SimulatedLedgers(tmp_path / name / STORE, ROOMY) for name in ("together", "alone"))
        names = [f"client-{i:03d}" for i in range(12)]
        for r, chosen in ((1, names), (2, names[3:]), (5, names[::2])):
            assert together.reserve_many(chosen, sampled(r), planned=9) == dict.fromkeys(chosen)
            for name in chosen:
                alone.of(name).reserve(sampled(r), planned=9)
        for ledgers in (together, SimulatedLedgers(together.path, ROOMY)):
            assert ledgers.spent([*names, "nobody"]) == alone.spent([*names, "nobody"])
            assert ledgers.taken([*names, "nobody"]) == {
                name: len(alone.of(name).events()) for name in [*names, "nobody"]
            }
        assert [together.of(name).events() for name in names] == [alone.of(name).events() for name in names]
        replays = read_store(together.path)
        assert sorted(replays) == names
        assert len({replay.standing.ledger for replay in replays.values()}) == len(names)
        assert all(replay.standing.names == {name} for name, replay in replays.items())

    def test_whose_budget_is_exhausted_is_told_and_the_others_go_on(self, path):
        """In one transaction; nothing of theirs is written."""
        ledgers = SimulatedLedgers(path, room_for([sampled()] * 2))
        ledgers.reserve_many(["a", "b"], sampled(1), planned=2)
        ledgers.reserve_many(["b"], sampled(2), planned=2)
        answers = ledgers.reserve_many(["a", "b", "c"], sampled(3), planned=2)
        assert (answers["a"], answers["c"]) == (None, None)
        assert isinstance(answers["b"], BudgetExhaustedError)
        assert "planned 2" in str(answers["b"])
        assert ledgers.taken(["a", "b", "c"]) == {"a": 2, "b": 2, "c": 1}

    def test_a_damaged_ledger_is_told_and_the_others_go_on(self, ledgers, path):
        """Nobody else pays for it."""
        damage(path, "UPDATE records SET line = x'ff' WHERE ledger = 'a' AND number = 2")
        answers = SimulatedLedgers(path, ROOMY).reserve_many(["a", "b"], sampled(9), planned=9)
        assert isinstance(answers["a"], LedgerError)
        assert answers["b"] is None
        assert ledgers.taken(["b"]) == {"b": 2}

    def test_a_ledger_whose_head_was_lost_is_not_begun_anew(self, ledgers, path):
        """Its lines are there."""
        damage(path, "DELETE FROM heads WHERE ledger = 'a'")
        answers = SimulatedLedgers(path, ROOMY).reserve_many(["a"], sampled(9), planned=9)
        assert isinstance(answers["a"], LedgerError)

    def test_one_name_twice_is_one_reservation(self, path):
        """A client takes part once in a round."""
        ledgers = SimulatedLedgers(path, ROOMY)
        assert ledgers.reserve_many(["a", "a"], sampled(1), planned=9) == {"a": None}
        assert ledgers.taken(["a"]) == {"a": 1}

    def test_what_another_process_wrote_meanwhile_is_counted(self, ledgers, path):
        """Only what was added is read, and all of that."""
        ledgers.taken(["a", "b"])
        SimulatedLedgers(path, ROOMY).reserve_many(["a", "b", "c"], sampled(7), planned=9)
        assert ledgers.taken(["a", "b", "c"]) == {"a": 4, "b": 2, "c": 1}
        ledgers.reserve_many(["a", "c"], sampled(8), planned=9)
        assert read_store(path)["a"].standing.events[-2:] == [sampled(7), sampled(8)]

    def test_damage_behind_what_is_remembered_is_found(self, ledgers, path):
        """A head that is not the one that this process wrote."""
        ledgers.taken(["a"])
        damage(
            path,
            "DELETE FROM records WHERE ledger = 'a' AND number = 3",
            "UPDATE heads SET count = 3 WHERE ledger = 'a'",
        )
        with pytest.raises(LedgerError):
            ledgers.taken(["a"])

    def test_ledgers_of_others_are_not_read(self, ledgers, path):
        """A damaged one troubles only those who ask for it."""
        damage(path, "UPDATE records SET line = x'ff' WHERE ledger = 'a' AND number = 2")
        assert SimulatedLedgers(path, ROOMY).taken(["b"]) == {"b": 1}

    def test_a_process_remembers_so_many_and_forgets_no_event(self, path, monkeypatch):
        """Beyond that it reads again."""
        monkeypatch.setattr("simulations.courses.MOST_KNOWN", 3)
        ledgers = SimulatedLedgers(path, room_for([sampled()] * 2))
        names = ["a", "b", "c", "d", "e"]
        for r in (1, 2):
            assert ledgers.reserve_many(names, sampled(r), planned=2) == dict.fromkeys(names)
        assert all(
            isinstance(e, BudgetExhaustedError) for e in ledgers.reserve_many(names, sampled(3), planned=2).values()
        )

    def test_nothing_is_written_of_a_transaction_that_fails(self, ledgers, path):
        """Neither in the file nor in what the process remembers."""
        before = ledgers.taken(["a", "b"])
        damage(path, "CREATE TRIGGER full BEFORE INSERT ON heads BEGIN SELECT RAISE(ABORT, 'full'); END")
        with pytest.raises(LedgerError, match="full"):
            ledgers.reserve_many(["a", "b", "c"], sampled(9), planned=9)
        damage(path, "DROP TRIGGER full")
        assert ledgers.taken(["a", "b", "c"]) == {**before, "c": 0}
        assert ledgers.reserve_many(["a", "b", "c"], sampled(9), planned=9) == dict.fromkeys("abc")


class TestTrust:
    """Damage is refused, also where nothing real is at stake: a figure that is too small misleads."""

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE records SET line = CAST(replace(line, '2.0', '9') AS BLOB) WHERE ledger = 'a' AND number = 2",
            "UPDATE records SET line = x'ff' WHERE ledger = 'a' AND number = 2",
            "UPDATE records SET line = substr(line, 1, length(line) - 1) WHERE ledger = 'a' AND number = 3",
            "DELETE FROM records WHERE ledger = 'a' AND number = 1",
            "DELETE FROM records WHERE ledger = 'a' AND number = 3",
            "DELETE FROM records WHERE ledger = 'a'",
            "DELETE FROM heads WHERE ledger = 'a'",
            "UPDATE heads SET count = 2 WHERE ledger = 'a'",
            "UPDATE records SET ledger = 'b', number = number + 2 WHERE ledger = 'a' AND number = 3",
        ],
    )
    def test_damaged_rows_are_refused_by_everybody(self, ledgers, path, statement):
        """Reading one, reading all, reserving, reporting."""
        damage(path, statement)
        ledger = SimulatedLedgers(path, ROOMY).of("a")
        for attempt in (
            ledger.events,
            lambda: ledger.budget,
            lambda: SimulatedLedgers(path, ROOMY).spent(["a", "b"]),
            lambda: ledger.reserve(sampled(9), planned=9),
            lambda: read_store(path),
        ):
            with pytest.raises(LedgerError):
                attempt()

    def test_a_sites_ledger_in_a_store_is_refused(self, ledgers, path):
        """It is not simulated."""
        damage(
            path,
            "UPDATE records SET line = CAST(replace(line, 'simulated\":true', 'simulated\":false') AS BLOB)",
            "DELETE FROM records WHERE ledger = 'b' AND number = 1",
        )
        with pytest.raises(LedgerError, match="real site"):
            SimulatedLedgers(path, ROOMY).of("b").events()

    @pytest.mark.parametrize("content", [b"{}\n", b"SQLite format 3\x00" + b"\x00" * 100])
    def test_another_file_is_refused(self, path, content):
        """A site's file, or garbage."""
        path.parent.mkdir()
        path.write_bytes(content)
        for attempt in (lambda: SimulatedLedgers(path, ROOMY).of("a").events(), lambda: read_store(path)):
            with pytest.raises(LedgerError):
                attempt()
        assert path.read_bytes() == content

    def test_another_database_is_refused(self, path):
        """It is not filled with our tables."""
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE patients (name TEXT)")
        with pytest.raises(LedgerError, match="no simulated ledgers"):
            SimulatedLedgers(path, ROOMY).of("a").reserve(sampled(), planned=1)

    def test_a_sites_ledger_refuses_a_store(self, ledgers, path, tmp_path):
        """In place of its file."""
        site = FileLedger(path, counter=tmp_path / "identity" / "ledgers.json", budget=ROOMY)
        with pytest.raises(LedgerError):
            site.reserve(sampled(), planned=1)

    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path):
        """A file where the folder should be."""
        (tmp_path / "file").write_text("")
        with pytest.raises(LedgerError):
            SimulatedLedgers(tmp_path / "file" / STORE, ROOMY).of("a").reserve(sampled(), planned=1)

    def test_a_missing_store_is_told_when_it_is_to_be_read(self, tmp_path):
        """A run without privacy has none."""
        with pytest.raises(LedgerError, match="not there"):
            read_store(tmp_path / STORE)

    def test_the_budget_is_per_client(self, path):
        """As each site has its own."""
        budget = Budget.opened(3.0, 1e-5)
        ledgers = SimulatedLedgers(path, budget)
        assert ledgers.of("a").budget == ledgers.of("b").budget == budget
