"""`coterie submit` and what follows, `coterie audit-log`: what an operator types and reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from common.config.render import to_toml
from server.operator_view import PlainView, TerminalView, log_line
from server.service.audit import AUDIT
from tests.helpers.agents import configuration
from tests.helpers.clinic import SITES, Clinic
from tests.helpers.processes import coterie


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Service and agents share this process's stdout with the command line; they have nothing to say here."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """A service with all its sites."""
    made = Clinic(tmp_path_factory.mktemp("clinic"))
    with made.serving(), made.agents():
        yield made


@pytest.fixture(scope="module")
def run(clinic: Clinic) -> str:
    """A run that has ended."""
    with clinic.operator() as operator:
        run: str = operator.submit(configuration("rounds=1", "name=quick"))["run"]
        list(operator.follow("status", run))
    return run


@pytest.fixture
def kit(clinic: Clinic) -> Path:
    return clinic.kits / "alice"


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(configuration("rounds=2")))
    return path


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    """The one JSON document on stdout."""
    return json.loads(capsys.readouterr().out)


class TestFromRunToModel:
    def test_submit_follow_fetch_predict(self, kit: Path, run_toml: Path, tmp_path: Path, capsys) -> None:
        """A file becomes a run, the run a folder, and the folder predictions: the whole way of an operator."""
        assert coterie("submit", run_toml, "--kit", kit, "--follow") == 0
        told = capsys.readouterr()
        assert "accuracy" in told.out
        assert "round 2 of 2: 3 of 3 answered, accuracy" in told.err
        assert coterie("fetch", "latest", "--kit", kit, "--out", tmp_path / "model") == 0
        assert coterie("predict", tmp_path / "model", "--data", "heart", "--out", tmp_path / "rows.csv") == 0
        assert len((tmp_path / "rows.csv").read_text().splitlines()) > 900
        capsys.readouterr()
        assert coterie("runs", "--root", tmp_path) == 0
        assert "completed" in capsys.readouterr().out

    def test_a_scenario_can_be_named_and_changed(self, kit: Path, capsys) -> None:
        """Its comparison is left out, which is said; `--set` changes what the file says."""
        assert coterie("submit", "heart", "--kit", kit, "--set", "rounds=1", "--set", "training.device=cpu",
                       "--follow", "--json") == 0  # fmt: skip
        out = capsys.readouterr()
        status = json.loads(out.out)
        assert (status["status"], status["rounds"], status["name"]) == ("completed", 1, "heart")
        assert "comparison is for simulations" in out.err

    def test_sums_are_warned_of_and_told(self, kit: Path, tmp_path: Path, capsys) -> None:
        """Secure aggregation is called experimental when a run is submitted; the page that comes back tells of sums."""
        sums = ["--set", "privacy.secure_aggregation=true", "--set", "rounds=1", "--set", "training.device=cpu"]
        assert coterie("submit", "heart", "--kit", kit, *sums, "--follow") == 0
        out = capsys.readouterr()
        assert "warning: secure aggregation is experimental" in out.err
        assert "round 1 of 1: 3 of 3 answered" in out.err
        assert coterie("fetch", "latest", "--kit", kit, "--out", tmp_path / "model") == 0
        page = (tmp_path / "model" / "report.html").read_text()
        assert "Smallest sum</dt><dd>3 updates, at least 2" in page
        assert "one machine held every key" not in page


class TestAsking:
    def test_runs_lists_the_queue(self, kit: Path, run: str, capsys) -> None:
        assert coterie("runs", "--kit", kit) == 0
        table = capsys.readouterr().out
        assert run[:12] in table
        assert "completed" in table
        assert coterie("runs", "--kit", kit, "--json") == 0
        assert run in {found["run"] for found in document(capsys)["runs"]}

    def test_status_takes_a_beginning(self, kit: Path, run: str, capsys) -> None:
        assert coterie("status", run[:10], "--kit", kit) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in (run, "completed", "1 of 1", "alice", *SITES))
        assert coterie("status", run[:10], "--kit", kit, "--json") == 0
        assert document(capsys)["accuracy"] > 0.5

    def test_status_of_an_ended_run_can_be_followed(self, kit: Path, run: str, capsys) -> None:
        """It ends at once."""
        assert coterie("status", run, "--kit", kit, "--follow", "--json") == 0
        assert document(capsys)["status"] == "completed"

    def test_sites_says_who_is_there(self, kit: Path, capsys) -> None:
        assert coterie("sites", "--kit", kit) == 0
        table = capsys.readouterr().out
        assert all(name in table for name in SITES)
        assert "yes" in table
        assert coterie("sites", "--kit", kit, "--json") == 0
        assert {site["attached"] for site in document(capsys)["sites"]} == {True}

    def test_logs_shows_what_was_asked_and_came(self, kit: Path, run: str, capsys) -> None:
        for follow in ([], ["--follow"]):
            assert coterie("logs", run, "--kit", kit, *follow) == 0
            lines = capsys.readouterr().out.splitlines()
            assert any("run-submitted" in line and "operator alice" in line for line in lines)
            assert sum(" asked " in line for line in lines) == len(SITES)
            assert any("run-ended" in line and "status completed" in line for line in lines)
        assert coterie("logs", run, "--kit", kit, "--json") == 0
        assert document(capsys)["lines"][0]["event"] == "run-submitted"

    def test_a_run_that_has_ended_cannot_be_stopped(self, kit: Path, run: str, capsys) -> None:
        assert coterie("stop", run, "--kit", kit) == 9
        assert "error: the run has ended: it is completed" in capsys.readouterr().err


class TestErrors:
    def test_an_unknown_run_suggests_near_ones(self, clinic: Clinic, kit: Path, capsys) -> None:
        with clinic.operator() as operator:
            operator.ask("stop", operator.submit(configuration("name=asthma", "rounds=1000"))["run"])
        assert coterie("status", "astma", "--kit", kit) == 9
        err = capsys.readouterr().err
        assert "error: there is no run `astma`" in err
        assert "hint: did you mean `asthma`" in err

    def test_another_partys_kit_is_refused(self, clinic: Clinic, capsys) -> None:
        assert coterie("runs", "--kit", clinic.kits / "hungary") == 11
        assert "hint:" in capsys.readouterr().err

    def test_a_folder_that_is_there_is_not_overwritten(self, kit: Path, tmp_path: Path, capsys) -> None:
        assert coterie("submit", "heart", "--kit", kit, "--set", "rounds=1", "--follow", "--json") == 0
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        capsys.readouterr()
        assert coterie("fetch", "latest", "--kit", kit, "--out", tmp_path / "out") == 9
        assert "exists already" in capsys.readouterr().err

    def test_a_run_that_fails_is_the_commands_failure(self, kit: Path, run_toml: Path, capsys) -> None:
        """Its exit code and words are those of what went wrong at the coordinator."""
        code = coterie("submit", run_toml, "--kit", kit, "--set", "data.name=patients", "--follow")
        assert code == 5
        assert "does not say what its data set `patients` looks like" in capsys.readouterr().err

    def test_a_coordinator_that_is_not_there_is_named(self, tmp_path: Path, capsys) -> None:
        clinic = Clinic(tmp_path)
        clinic.lead_to(9)  # discard: nobody listens there
        assert coterie("sites", "--kit", clinic.kits / "alice", "--json") == 12
        error = document(capsys)["error"]
        assert (error["code"], "127.0.0.1:9" in error["message"]) == ("unreachable", True)


class TestAuditLog:
    @pytest.fixture
    def written(self, tmp_path: Path) -> Clinic:
        """A service that started and ended."""
        clinic = Clinic(tmp_path)
        with clinic.serving():
            pass
        return clinic

    def test_a_sound_log_is_called_sound(self, written: Clinic, capsys) -> None:
        server = written.kits / "server"
        assert coterie("audit-log", "verify", "--kit", server) == 0
        assert "sound: 2 lines" in capsys.readouterr().out
        assert coterie("audit-log", "verify", "--kit", server, "--json") == 0
        assert document(capsys)["problem"] is None

    def test_a_changed_log_exits_with_the_first_bad_line(self, written: Clinic, capsys) -> None:
        path = written.state / AUDIT
        path.write_bytes(path.read_bytes().replace(b"service-started", b"service-stopped"))
        for as_json in ([], ["--json"]):
            assert coterie("audit-log", "verify", "--kit", written.kits / "server", *as_json) == 9
        assert "line 2: it does not follow the line before it" in capsys.readouterr().err

    def test_show_is_a_table_or_a_document(self, written: Clinic, capsys) -> None:
        server = written.kits / "server"
        assert coterie("audit-log", "show", "--kit", server) == 0
        assert "service-started" in capsys.readouterr().out
        assert coterie("audit-log", "show", "--kit", server, "--event", "service-stopped", "--json") == 0
        assert [line["event"] for line in document(capsys)["lines"]] == ["service-stopped"]

    def test_there_is_none_before_the_first_start(self, tmp_path: Path, capsys) -> None:
        clinic = Clinic(tmp_path)
        assert coterie("audit-log", "verify", "--kit", clinic.kits / "server") == 9
        assert "hint: `coterie server` makes it" in capsys.readouterr().err


def status(**changes: object) -> dict:
    facts: dict = {
        "run": "ab" * 16, "name": "heart", "status": "running", "operator": "alice", "sites": ["a", "b"], "rounds": 3,
        "rounds_done": 1, "round": 2, "attempt": 1, "step": "training", "submitted": "2026-01-02T03:04:05.678+00:00",
        "started": None, "finished": None, "problem": None, "waiting_for_sites": [], "waiting_for_runs": [],
        "cohort": ["a", "b"], "replies": {"a": "received", "b": "working"}, "accuracy": None, "loss": None,
        "last_round": {"round": 1, "survivors": 2, "asked": 2, "accuracy": 0.75, "loss": 0.5, "train_loss": 0.4,
                       "seconds": 1.25},
    }  # fmt: skip
    return facts | changes


class TestFollowing:
    """Lines off a terminal, a redrawn display on one."""

    def test_a_line_is_told_once(self, capsys) -> None:
        view = PlainView()
        for now in (status(), status(), status(replies={"a": "used", "b": "deadline-exceeded"})):
            view.show(now)
        assert capsys.readouterr().err.splitlines() == [
            "running",
            "round 1 of 3: 2 of 2 answered, accuracy 0.750, loss 0.500, 1.2 s",
            "round 2: b: deadline-exceeded",
        ]

    def test_what_a_run_waits_for_is_told(self, capsys) -> None:
        waiting = status(
            status="queued", waiting_for_sites=["a"], waiting_for_runs=["cd" * 16], last_round=None, replies={}
        )
        PlainView().show(waiting)
        assert capsys.readouterr().err.splitlines() == [
            "waits for sites a (not attached)", "waits for runs cdcdcdcdcdcd (same sites)",
        ]  # fmt: skip

    def test_under_client_level_privacy_nothing_is_missing_but_the_names(self, capsys) -> None:
        last = {"round": 1, "accuracy": 0.75, "loss": None, "train_loss": None, "seconds": 2.0}
        PlainView().show(status(replies={}, cohort=[], last_round=last))
        assert "round 1 of 3: accuracy 0.750, 2.0 s" in capsys.readouterr().err

    def test_a_terminal_shows_rounds_and_replies(self, monkeypatch, capsys) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
        with TerminalView() as view:
            view.show(status())
        shown = capsys.readouterr().err
        assert "round 1 of 3" in shown
        assert "b: working" in shown

    def test_a_log_line_shortens_digests(self) -> None:
        line = {"at": "2026-01-02T03:04:05.678+00:00", "event": "asked", "number": 3, "blob": "ab" * 32, "site": "a"}
        assert log_line(line) == "2026-01-02 03:04:05  asked  blob abababababab, site a"
