"""Ledgers of a run on a cluster: the contract of every ledger, a file a client, found again by whatever engine."""

from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from client.ledger_lookup import entries_of
from common.errors import BudgetExhaustedError, LedgerError, RunError
from common.privacy.accounting.accountant import spent
from common.privacy.ledger import FileLedger
from common.privacy.ledger.partitions import partition_ledger, partition_ledgers
from common.privacy.ledger.simulated import STORE
from simulations.cluster.ledgers import PartitionLedgers, ledgers_in, use_partition_files
from simulations.ledgers import SimulatedLedgers
from tests.helpers.events import sampled
from tests.helpers.ledgers import ROOMY, LedgerContract, room_for


@pytest.fixture
def ledgers(tmp_path: Path) -> PartitionLedgers:
    """Two clients' ledgers: three events, and one."""
    ledgers = PartitionLedgers(tmp_path, ROOMY)
    for r in (1, 2, 3):
        ledgers.of("a").reserve(sampled(r), planned=9)
    ledgers.of("b").reserve(sampled(1), planned=9)
    return ledgers


class TestContract(LedgerContract):
    """What every ledger must do."""

    @pytest.fixture
    def open_ledger(self, tmp_path: Path) -> Any:
        """Each time new objects, on the same files."""

        def open_ledger(budget: Any, *, allow_non_private: bool = False) -> Any:
            return PartitionLedgers(tmp_path, budget, allow_non_private=allow_non_private).of("icu")

        return open_ledger


class TestFiles:
    """One a client, and one for the coordinator."""

    def test_each_client_has_its_own(self, ledgers: PartitionLedgers, tmp_path: Path) -> None:
        """With its counter in another folder; only the owner reads them."""
        files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json*") if path.is_file())
        locks = [file for file in files if "/." in file]
        assert [file for file in files if file not in locks] == [
            "ledgers/a.jsonl",
            "ledgers/b.jsonl",
            "ledgers/counters/a.json",
            "ledgers/counters/b.json",
        ]
        assert {stat.S_IMODE((tmp_path / file).stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE((tmp_path / "ledgers").stat().st_mode) == 0o700

    def test_what_all_have_spent_and_taken_is_told(self, ledgers: PartitionLedgers, tmp_path: Path) -> None:
        """As it is now, whoever wrote; whoever was never asked has spent nothing."""
        PartitionLedgers(tmp_path, ROOMY).of("b").reserve(sampled(2), planned=9)
        two, three = (spent([sampled()] * n, budget=ROOMY) for n in (2, 3))
        assert ledgers.spent(["a", "b", "c"]) == {"a": three, "b": two, "c": 0.0}
        assert ledgers.taken(["a", "b", "c"]) == {"a": 3, "b": 2, "c": 0}
        assert not (tmp_path / "ledgers" / "c.jsonl").exists()

    def test_the_coordinators_ledger_counts_clients(self, ledgers: PartitionLedgers) -> None:
        """With a budget of its own, under a name that no client has."""
        budget = room_for([sampled()])
        own = ledgers.coordinator(budget)
        assert own.reserve(sampled(unit="client", trust="coordinator"), planned=1) == budget.epsilon
        assert own.standing().unit == "client"
        assert ledgers.of("a").standing().unit == "example"

    def test_one_exhausted_budget_does_not_stop_the_others(self, tmp_path: Path) -> None:
        """Each answer is by name."""
        ledgers = PartitionLedgers(tmp_path, room_for([sampled()]))
        ledgers.of("a").reserve(sampled(1, run="before"), planned=1)
        answers = ledgers.reserve_many(["a", "b"], sampled(1), planned=1)
        assert isinstance(answers["a"], BudgetExhaustedError)
        assert answers["b"] is None
        assert ledgers.taken(["a", "b"]) == {"a": 1, "b": 1}

    def test_they_travel_as_a_path_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """To processes that work in another folder."""
        monkeypatch.chdir(tmp_path)
        sent = pickle.dumps(PartitionLedgers(Path("run"), ROOMY))
        monkeypatch.chdir("/")
        pickle.loads(sent).of("a").reserve(sampled(1), planned=1)  # noqa: S301 - our own
        assert (tmp_path / "run" / "ledgers" / "a.jsonl").exists()


class TestTrust:
    """They are simulated, and verified like a site's."""

    def test_a_site_does_not_go_on_with_one(self, ledgers: PartitionLedgers, tmp_path: Path) -> None:
        """Its record says what it is."""
        own = ledgers.of("a")
        with pytest.raises(LedgerError, match="simulated"):
            FileLedger(own.path, counter=own.counter, budget=ROOMY).reserve(sampled(9), planned=9)

    def test_nor_a_simulation_with_a_sites(self, tmp_path: Path) -> None:
        """Nothing simulated is added to it."""
        simulated = partition_ledger(tmp_path, "a", ROOMY)
        FileLedger(simulated.path, counter=simulated.counter, budget=ROOMY).reserve(sampled(1), planned=9)
        with pytest.raises(LedgerError, match="real site"):
            simulated.reserve(sampled(2), planned=9)

    @pytest.mark.parametrize("file", ["ledgers/a.jsonl", "ledgers/counters/a.json"])
    def test_a_file_that_is_missing_is_found_out(self, ledgers: PartitionLedgers, tmp_path: Path, file: str) -> None:
        """Nothing is spent anew as if nothing had been."""
        (tmp_path / file).unlink()
        with pytest.raises(LedgerError, match="missing"):
            PartitionLedgers(tmp_path, ROOMY).of("a").reserve(sampled(4), planned=9)
        assert "missing" in {entry.name: entry.problem for entry in entries_of("", tmp_path, None)}["a"]

    def test_a_line_that_was_changed_is_found_out(self, ledgers: PartitionLedgers, tmp_path: Path) -> None:
        """By everybody who reads."""
        path = tmp_path / "ledgers" / "a.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"server_round":3', b'"server_round":4'))
        for attempt in (PartitionLedgers(tmp_path, ROOMY).of("a").events, lambda: ledgers.spent(["a"])):
            with pytest.raises(LedgerError, match="cannot be trusted"):
                attempt()


class TestWhichLedgers:
    """A run's ledgers are where it began them."""

    def test_a_run_that_a_cluster_began_goes_on_with_its_files(self, tmp_path: Path) -> None:
        """With every engine."""
        assert isinstance(ledgers_in(tmp_path, ROOMY), SimulatedLedgers)
        use_partition_files(tmp_path)
        use_partition_files(tmp_path)
        assert isinstance(ledgers_in(tmp_path, ROOMY), PartitionLedgers)

    def test_a_run_of_one_machine_does_not_move_to_a_cluster(self, tmp_path: Path) -> None:
        """What it has spent would be forgotten."""
        SimulatedLedgers(tmp_path / STORE, ROOMY).of("a").reserve(sampled(1), planned=1)
        with pytest.raises(RunError, match="one machine"):
            use_partition_files(tmp_path)
        assert isinstance(ledgers_in(tmp_path, ROOMY), SimulatedLedgers)

    def test_reports_find_them(self, ledgers: PartitionLedgers, tmp_path: Path) -> None:
        """`coterie ledger` on a run's folder shows each client."""
        entries = entries_of(str(tmp_path), tmp_path, None)
        assert {entry.name: len(entry.standing.events) for entry in entries} == {"a": 3, "b": 1}
        assert all(entry.standing.simulated and not entry.problem for entry in entries)
        assert [ledger.name for ledger in partition_ledgers(tmp_path)] == ["a", "b"]
        assert json.loads(Path(entries[0].where).read_text().splitlines()[0])["simulated"] is True
