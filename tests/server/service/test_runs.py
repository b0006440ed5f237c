"""Runs that a service carries out with real sites: what comes of them, and what it takes to get there."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import DataError, RunError
from server.service.audit import AUDIT, read_lines, verify
from server.service.process import DATABASE
from server.service.state import ServiceState
from server.store import RunFolder
from tests.helpers.agents import configuration
from tests.helpers.clinic import SITES, Clinic, Gate, end_of, seen, simulated


@pytest.fixture
def clinic(tmp_path: Path) -> Clinic:
    return Clinic(tmp_path)


def run_config(*changes: str) -> RunConfig:
    return configuration(f"data.sites={json.dumps(list(SITES))}", *changes)


def events(clinic: Clinic, *names: str) -> list[dict]:
    return list(read_lines(clinic.state / AUDIT, wanted=lambda line: not names or line["event"] in names))


class TestARun:
    """From an operator's word to a model in their hands."""

    def test_ends_with_the_model_of_a_simulation(self, clinic: Clinic, tmp_path: Path) -> None:
        """Three sites over the plane reach, byte for byte, what one process does; result and report come along."""
        config = run_config()
        with clinic.serving(), clinic.agents(), clinic.operator() as operator:
            run = operator.submit(config)["run"]
            status = end_of(operator, run)
            assert (status["status"], status["rounds_done"]) == ("completed", 3)
            operator.fetch("latest", tmp_path / "fetched")
        fetched = RunFolder.open(tmp_path / "fetched")
        assert (fetched.path / "model.safetensors").read_bytes() == simulated(config, tmp_path / "simulated")
        assert fetched.config() == config
        result = fetched.read_result() or {}
        assert (result["accuracy"], result["simulated"]) == (status["accuracy"], False)
        assert [row["survivors"] for row in fetched.rounds()] == [list(SITES)] * 3
        assert "<html" in (fetched.path / "report.html").read_text()
        assert fetched.status == "completed"

    def test_is_all_in_the_audit_log(self, clinic: Clinic) -> None:
        """Who came, every order, every answer and what was released stand there, in a chain that is whole."""
        with clinic.serving(), clinic.agents(), clinic.operator() as operator:
            run = operator.submit(run_config("rounds=1"))["run"]
            end_of(operator, run)
        asked, received = events(clinic, "asked"), events(clinic, "received")
        assert sorted(line["site"] for line in asked) == sorted(line["site"] for line in received) == list(SITES)
        assert {line["message"] for line in asked} == {line["message"] for line in received}
        assert len({line["blob"] for line in asked}) == 1, "one ciphertext for all of them"
        (released,) = events(clinic, "model-released")
        assert len(released["model"]) == 64
        assert {line["party"] for line in events(clinic, "site-attached", "site-detached")} == set(SITES)
        state = ServiceState(clinic.state / DATABASE, reading=True)
        try:
            assert verify(clinic.state / AUDIT, state).problem == ""
        finally:
            state.close()

    def test_learns_from_the_sites_what_their_data_looks_like(self, clinic: Clinic, tmp_path: Path) -> None:
        """A data set that only the sites know: the model is built from what they all say of it."""
        for i, site in enumerate(SITES):
            rows = "\n".join(f"{(7 * i + 3 * k) % 11},{k % 5},{k % 2}" for k in range(24))
            (clinic.kits / site / "rows.csv").write_text(f"age,dose,outcome\n{rows}\n")
            (clinic.kits / site / "site.toml").write_text(
                '[data.patients]\nsource = "csv:rows.csv"\nlabel = "outcome"\nfeatures = ["age", "dose"]\n'
                'classes = ["0", "1"]\n'
            )
        with clinic.serving(), clinic.agents(), clinic.operator() as operator:
            run = operator.submit(run_config("data.name=patients", "rounds=2"))["run"]
            status = end_of(operator, run)
            operator.fetch(run, tmp_path / "fetched")
        assert (status["status"], status["accuracy"], status["problem"]) == ("completed", None, None)
        assert RunFolder.open(tmp_path / "fetched").read_result()["model"]["parameters"] == 2 * 2 + 2  # type: ignore[index]

    def test_fails_where_sites_do_not_agree_what_the_data_is(self, clinic: Clinic) -> None:
        """Columns in another order would train nonsense; the run says whose differ, before any training."""
        for site in SITES:
            features = '["dose", "age"]' if site == SITES[1] else '["age", "dose"]'
            (clinic.kits / site / "rows.csv").write_text("age,dose,outcome\n1,2,0\n3,4,1\n5,6,0\n7,8,1\n2,2,0\n9,9,1\n")
            (clinic.kits / site / "site.toml").write_text(
                f'[data.patients]\nsource = "csv:rows.csv"\nlabel = "outcome"\nfeatures = {features}\n'
                'classes = ["0", "1"]\n'
            )
        with clinic.serving(), clinic.agents(), clinic.operator() as operator:
            status = end_of(operator, operator.submit(run_config("data.name=patients"))["run"])
            assert status["status"] == "failed"
            assert "describe `patients` differently" in status["problem"]["message"]
            with pytest.raises(RunError, match="no result"):
                operator.fetch("latest", clinic.folder / "fetched")
        assert status["problem"]["code"] == DataError.code
        assert events(clinic, "round-started") == []


class TestPrivacy:
    """What the coordinator itself releases."""

    def test_unit_client_spends_from_a_ledger_that_outlives_the_run(self, clinic: Clinic, tmp_path: Path) -> None:
        """The ledger is the service's; a second run of the same data finds its budget used."""
        private = ["privacy.unit=client", "privacy.noise_multiplier=2.0", "rounds=2", "training.local_steps=1"]
        with clinic.serving(), clinic.agents(), clinic.operator() as operator:
            first = end_of(operator, operator.submit(run_config(*private))["run"])
            second = end_of(operator, operator.submit(run_config(*private, "name=again"))["run"])
            operator.fetch(first["run"], tmp_path / "fetched")
            told = json.dumps([first, operator.ask("logs", first["run"])["lines"]])
        assert (first["status"], second["status"]) == ("completed", "failed")
        assert second["problem"]["code"] == "budget-exhausted"
        assert (clinic.state / "ledger" / "heart.jsonl").is_file()
        assert (clinic.kits / "server" / "identity" / "ledgers" / "heart.json").is_file()
        result = RunFolder.open(tmp_path / "fetched").read_result() or {}
        assert set(result["privacy"]["epsilon"]) == set(SITES)
        assert "survivors" not in told, "nobody is told who answered"
        lines = json.loads(told)[1]
        assert [line["number"] for line in lines] == list(range(len(lines))), "gaps would tell how many were asked"
        assert [line for line in lines if line["event"].startswith("round-") and "at" in line] == []
        assert [row["cohort"] for row in RunFolder.open(tmp_path / "fetched").rounds()] == [[], []]

    def test_unit_client_tells_nobody_who_is_asked(self, clinic: Clinic) -> None:
        """Neither the run's status nor the list of sites, while a cohort of one is at work."""
        private = ["privacy.unit=client", "privacy.noise_multiplier=2.0", "rounds=1", "training.local_steps=1"]
        gates = {site: Gate() for site in SITES}
        with clinic.serving() as service, clinic.agents(gates=gates), clinic.operator() as operator:
            run = operator.submit(run_config(*private))["run"]
            for gate in gates.values():
                assert gate.arrived.wait(60)
            assert any(facts.open_orders for facts in service._hub.attached().values())
            told = {(site["open_orders"], site["state"]) for site in operator.ask("sites")["sites"]}
            for gate in gates.values():
                gate.open()
            assert end_of(operator, run)["status"] == "completed"
        assert told == {(0, None)}


class TestRounds:
    """Sites that do not answer in time."""

    def test_a_deadline_closes_a_round_without_a_straggler(self, clinic: Clinic) -> None:
        """The others' updates count; the straggler is on record as `deadline-exceeded`."""
        gate = Gate()
        late = SITES[2]
        with clinic.serving(), clinic.agents(gates={late: gate}), clinic.operator() as operator:
            run = operator.submit(run_config("rounds=1", "cohort.deadline_seconds=8"))["run"]
            status = end_of(operator, run)
            gate.open()
        (row,) = RunFolder.open(clinic.state / "runs" / run).rounds()
        assert (row["survivors"], row["failures"]) == (list(SITES[:2]), {late: "deadline-exceeded"})
        assert status["status"] == "completed"

    def test_over_sampling_does_not_wait_for_the_slowest(self, clinic: Clinic) -> None:
        """Three are asked for two updates; the third is told to stop once they are there."""
        gate = Gate()
        slow = SITES[0]
        with clinic.serving(), clinic.agents(gates={slow: gate}), clinic.operator() as operator:
            run = operator.submit(run_config("rounds=2", "cohort.size=2", "cohort.over_sampling=0.5"))["run"]
            assert end_of(operator, run)["status"] == "completed"
            gate.open()
        rows = RunFolder.open(clinic.state / "runs" / run).rounds()
        assert [row["survivors"] for row in rows] == [list(SITES[1:])] * 2
        assert {row["failures"][slow] for row in rows} == {"deadline-exceeded"}

    def test_too_few_survivors_leave_the_model_as_it_is(self, clinic: Clinic) -> None:
        """With fewer updates than asked for, no round is used, and the run says so."""
        gate = Gate()
        changes = ("rounds=1", "cohort.deadline_seconds=1", "cohort.min_survivors=3")
        with clinic.serving(), clinic.agents(gates={SITES[1]: gate}), clinic.operator() as operator:
            status = end_of(operator, operator.submit(run_config(*changes))["run"])
            gate.open()
        assert status["status"] == "failed"
        assert "no client sent an update" in status["problem"]["message"]


class TestStopping:
    """Ending a run, and ending the service under it."""

    def test_an_operator_ends_a_run(self, clinic: Clinic) -> None:
        """It stops at once, also while a site works; its folder stays."""
        gate = Gate()
        with clinic.serving(), clinic.agents(gates={SITES[0]: gate}), clinic.operator() as operator:
            run = operator.submit(run_config())["run"]
            assert gate.arrived.wait(60)
            operator.ask("stop", run[:10])
            assert end_of(operator, run)["status"] == "stopped"
            with pytest.raises(RunError, match="has ended"):
                operator.ask("stop", run)
            gate.open()
        assert (clinic.state / "runs" / run / "run.toml").is_file()
        assert [line["status"] for line in events(clinic, "run-ended")] == ["stopped"]

    def test_a_service_that_ends_goes_on_with_its_runs_when_it_is_back(self, clinic: Clinic, tmp_path: Path) -> None:
        """The queue keeps its order, the agents come back by themselves, and the models are those of quiet runs."""
        gate, config = Gate(), run_config("rounds=4")
        other = run_config("name=second", "seeds.model=5")
        with clinic.serving(), clinic.operator() as operator:
            pass  # to have a port
        with clinic.agents(gates={SITES[0]: gate}), ExitStack() as stack:
            watching = stack.enter_context(clinic.operator())
            with clinic.serving(), clinic.operator() as operator:
                first, second = operator.submit(config)["run"], operator.submit(other)["run"]
                assert seen(operator, second, lambda s: s["waiting_for_runs"] == [first])
                assert gate.arrived.wait(60)
                following = watching.follow("status", first)
                assert next(following)["attempt"] == 1
            state = ServiceState(clinic.state / DATABASE, reading=True)
            assert [(run.run_id, run.status) for run in state.runs()] == [(first, "running"), (second, "queued")]
            state.close()
            gate.open()
            with clinic.serving(), clinic.operator() as operator:
                *_, last = following  # across the restart
                assert (last["status"], last["attempt"]) == ("completed", 2)
                assert end_of(operator, second)["attempt"] == 1
                operator.fetch(first, tmp_path / "first")
                operator.fetch(second, tmp_path / "second")
        assert (tmp_path / "first" / "model.safetensors").read_bytes() == simulated(config, tmp_path / "a")
        assert (tmp_path / "second" / "model.safetensors").read_bytes() == simulated(other, tmp_path / "b")
        started = [line["run"] for line in events(clinic, "run-started")]
        assert started == [first, first, second]
