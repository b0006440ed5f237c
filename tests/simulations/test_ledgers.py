"""Ledgers of simulated clients: the same contract as a site's, in one file a run, and never a site's."""

import pickle
import sqlite3
from contextlib import closing

import pytest

from common.errors import LedgerError
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
            assert connection.execute(statement).rowcount > 0
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
