"""Which run starts when, seen through runs that a test carries out itself."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigError, RunError
from server.service.audit import AUDIT, AuditLog, read_lines
from server.service.board import Board
from server.service.orders import Stop
from server.service.scheduler import RESUME_SECONDS, RETRY_SECONDS, Scheduler, Waiting
from server.service.state import Run, ServiceState
from tests.helpers.processes import wait_until

BOUND = 60.0


class Runs:
    """Carries runs out by waiting for the test's word."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self._words: dict[str, list[BaseException | None]] = {}
        self._changed = threading.Condition()

    def __call__(self, run: Run, stop: Stop) -> None:
        with self._changed:
            self.started.append(run.name)
            self._changed.notify_all()
            while not self._words.get(run.name):
                self._changed.wait(0.05)
                stop.check()
            error = self._words[run.name].pop()
        if error is not None:
            raise error

    def end(self, name: str, error: BaseException | None = None) -> None:
        with self._changed:
            self._words.setdefault(name, []).append(error)
            self._changed.notify_all()

    def wait_started(self, *names: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(names) <= set(self.started), BOUND), self.started


class Office:
    """A queue, a scheduler and its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.attached, self.now = folder, {"a", "b", "c", "d"}, 0.0
        self.denied: set[str] = set()
        self.runs = Runs()
        self.state = ServiceState(folder / "service.db")
        self.audit = AuditLog(folder / AUDIT, self.state)
        self.board = Board()
        self.scheduler = self._make()

    def _make(self) -> Scheduler:
        return Scheduler(
            self.state,
            carry_out=self.runs,
            attached=lambda: frozenset(self.attached),
            audit=self.audit,
            board=self.board,
            denied=lambda name: name in self.denied,
            clock=lambda: self.now,
        )

    def restart(self) -> None:
        """What a process that ended and came back does."""
        self.scheduler.close()
        self.runs.started.clear()
        self.scheduler = self._make()
        self.scheduler.start()

    def submit(self, name: str, *sites: str) -> str:
        run_id = f"{len(self.state.runs()) + 1:032x}"
        self.state.add(
            Run(
                run_id=run_id,
                name=name,
                operator="alice",
                config="{}",
                config_digest="",
                authorization="",
                sites=sites,
                rounds=1,
            )
        )
        self.scheduler.wake()
        return run_id

    def status(self, run_id: str) -> str:
        run = self.state.run(run_id)
        assert run is not None
        return run.status

    def wait(self, run_id: str, status: str) -> None:
        wait_until(lambda: self.status(run_id) == status)

    def settled(self) -> list[str]:
        """What has started once a run that nothing hinders has started, too."""
        self.submit("probe", "d")
        self.runs.wait_started("probe")
        return [name for name in self.runs.started if name != "probe"]

    def close(self) -> None:
        self.scheduler.close()
        self.audit.close()
        self.state.close()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    made.scheduler.start()
    yield made
    made.close()


class TestOrder:
    def test_runs_that_share_no_site_go_side_by_side(self, office: Office) -> None:
        office.submit("one", "a")
        office.submit("two", "b", "c")
        office.runs.wait_started("one", "two")

    def test_runs_that_share_a_site_go_one_after_the_other(self, office: Office) -> None:
        """The second starts when the first has ended, however it ended."""
        first, second = office.submit("one", "a", "b"), office.submit("two", "b", "c")
        office.runs.wait_started("one")
        assert office.settled() == ["one"]
        found = office.state.run(second)
        assert found is not None
        assert office.scheduler.waiting(found).runs == (first,)
        office.runs.end("one", RunError("no"))
        office.runs.wait_started("two")
        office.wait(first, "failed")

    def test_nobody_overtakes_a_run_that_waits_for_a_site(self, office: Office) -> None:
        """The first waits for `b`; the second could start, but would hold up the first with site `a`."""
        office.attached = {"a", "c", "d"}
        first = office.submit("one", "a", "b")
        office.submit("two", "a")
        assert office.settled() == []
        found = office.state.run(first)
        assert found is not None
        assert office.scheduler.waiting(found).sites == ("b",)
        office.attached.add("b")
        office.scheduler.wake()
        office.runs.wait_started("one")
        office.runs.end("one")
        office.runs.wait_started("two")


class TestEnds:
    def test_a_run_that_fails_says_why(self, office: Office) -> None:
        run = office.submit("one", "a")
        office.runs.end("one", ConfigError("wrong", hint="mend it"))
        office.wait(run, "failed")
        found = office.state.run(run)
        assert found is not None
        assert found.problem == {"code": "config-invalid", "message": "wrong", "hint": "mend it", "exit_code": 3}

    def test_a_fault_ends_its_run_only(self, office: Office) -> None:
        """An operator learns that there was a fault, not what it says: it could quote anything."""
        one, two = office.submit("one", "a"), office.submit("two", "b")
        office.runs.end("one", ZeroDivisionError("secret"))
        office.wait(one, "failed")
        office.runs.end("two")
        office.wait(two, "completed")
        found = office.state.run(one)
        assert found is not None
        assert "secret" not in str(found.problem)
        assert "ZeroDivisionError" in str(found.problem)

    def test_a_fault_of_the_queue_itself_only_delays_a_run(
        self, office: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was to be started when it struck is started soon after, without another word from anybody."""
        begin, faults = office.state.begin, [sqlite3.OperationalError("database is locked")]

        def once(run_id: str) -> Run:
            if faults:
                raise faults.pop()
            return begin(run_id)

        monkeypatch.setattr(office.state, "begin", once)
        office.submit("one", "a")
        office.runs.wait_started("one")
        assert not faults

    def test_a_full_disk_only_delays_a_run(self, office: Office) -> None:
        """It goes on by itself, as another attempt."""
        run = office.submit("one", "a")
        full = RunError("cannot be written")
        full.__cause__ = OSError(errno.ENOSPC, "full")
        office.runs.end("one", full)
        wait_until(lambda: office.board.live(run).problem)
        assert office.status(run) == "running"
        office.now += RETRY_SECONDS
        office.scheduler.wake()
        office.runs.end("one")
        office.wait(run, "completed")
        found = office.state.run(run)
        assert found is not None
        assert found.attempt == 2


class TestStopping:
    def test_a_run_that_waits_ends_at_once(self, office: Office) -> None:
        office.attached.clear()
        run = office.submit("one", "a")
        assert office.scheduler.stop_run(run).status == "stopped"

    def test_a_run_that_is_carried_out_ends_soon(self, office: Office) -> None:
        run = office.submit("one", "a")
        office.runs.wait_started("one")
        office.scheduler.stop_run(run)
        office.wait(run, "stopped")
        assert [line["status"] for line in read_lines(office.folder / AUDIT) if line["event"] == "run-ended"] == [
            "stopped"
        ]

    def test_a_run_that_was_told_to_end_does_not_go_on_after_a_restart(self, office: Office) -> None:
        """The process ended between the operator's word and the run's end."""
        run = office.submit("one", "a")
        office.runs.wait_started("one")
        office.scheduler.close()
        office.state.ask_to_stop(run)
        office.restart()
        office.wait(run, "stopped")
        assert office.settled() == []


class TestDenied:
    def test_a_queued_run_of_a_denied_operator_ends_unstarted(self, office: Office) -> None:
        """It waited for a site; the operator was shut out meanwhile, and the site comes then."""
        office.attached.remove("a")
        run = office.submit("one", "a")
        assert office.settled() == []
        office.denied.add("alice")
        office.attached.add("a")
        office.scheduler.wake()
        office.wait(run, "stopped")
        found = office.state.run(run)
        assert found is not None
        assert "operator denied" in str(found.problem)
        assert "one" not in office.runs.started

    def test_a_run_that_is_carried_out_ends_once_its_operator_is_denied(self, office: Office) -> None:
        """Wherever it looks next; nobody has to ask for it."""
        run = office.submit("one", "a")
        office.runs.wait_started("one")
        office.denied.add("alice")
        office.wait(run, "stopped")
        found = office.state.run(run)
        assert found is not None
        assert "operator denied" in str(found.problem)

    def test_nobody_waits_for_a_site_that_is_denied(self, office: Office) -> None:
        """A run goes without it, and later ones that share only that site are not held up."""
        office.attached = {"a", "b", "d"}
        first, second = office.submit("one", "a", "c"), office.submit("two", "b", "c")
        assert office.settled() == []
        office.denied.add("c")
        found = office.state.run(second)
        assert found is not None
        assert office.scheduler.waiting(found) == Waiting(sites=(), runs=())
        office.scheduler.wake()
        office.runs.wait_started("one", "two")
        for name, run in (("one", first), ("two", second)):
            office.runs.end(name)
            office.wait(run, "completed")

    def test_a_run_whose_sites_are_all_denied_fails(self, office: Office) -> None:
        """Instead of training nobody."""
        office.denied.add("a")
        run = office.submit("one", "a")
        office.wait(run, "failed")
        assert office.settled() == []


class TestRestarts:
    def test_what_was_running_goes_on_first(self, office: Office) -> None:
        """With one more attempt, before what was queued behind it."""
        first = office.submit("one", "a")
        office.submit("two", "a")
        office.runs.wait_started("one")
        office.restart()
        office.runs.wait_started("one")
        assert office.settled() == ["one"]
        found = office.state.run(first)
        assert found is not None
        assert (found.status, found.attempt) == ("running", 2)

    def test_a_site_that_does_not_come_back_holds_nothing_up_for_ever(self, office: Office) -> None:
        """A new run waits for all its sites; one that was interrupted goes on without, after a while."""
        office.submit("one", "a", "b")
        office.runs.wait_started("one")
        office.attached.remove("b")
        office.restart()
        assert office.settled() == []
        office.now += RESUME_SECONDS
        office.scheduler.wake()
        office.runs.wait_started("one")
