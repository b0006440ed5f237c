"""The queue on disk: what a restarted service finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import RunError
from server.service.state import Run, ServiceState, find_run


@pytest.fixture
def state(tmp_path: Path) -> Iterator[ServiceState]:
    opened = ServiceState(tmp_path / "service.db")
    yield opened
    opened.close()


def run(number: int = 0, name: str = "heart", **changes: object) -> Run:
    facts: dict = {
        "run_id": f"{number:032x}", "name": name, "operator": "alice", "config": "{}", "config_digest": "d",
        "authorization": "signed", "sites": ("a", "b"), "rounds": 3, **changes,
    }  # fmt: skip
    return Run(**facts)


class TestQueue:
    def test_keeps_runs_in_the_order_in_which_they_came(self, state: ServiceState) -> None:
        """Whatever their ids; also for who opens the file anew."""
        for number in (5, 3, 9):
            state.add(run(number))
        again = ServiceState(state.path, reading=True)
        assert [int(r.run_id, 16) for r in again.runs()] == [5, 3, 9]
        assert again.runs()[0].sites == ("a", "b")
        again.close()

    def test_the_same_submission_is_queued_once(self, state: ServiceState) -> None:
        """An operator whose connection broke sends it again."""
        assert state.add(run(1)) == state.add(run(1))
        assert len(state.runs()) == 1

    @pytest.mark.parametrize("change", [{"authorization": "other"}, {"config": "[]"}])
    def test_an_id_means_one_run(self, state: ServiceState, change: dict) -> None:
        """Another run under a known id is refused, and the first stays as it is."""
        kept = state.add(run(1))
        with pytest.raises(RunError, match="another run has the id"):
            state.add(run(1, **change))
        assert state.runs() == [kept]

    def test_counts_attempts(self, state: ServiceState) -> None:
        """Each start is one more; the time of the first stays."""
        state.add(run(1))
        first, second = state.begin(run(1).run_id), state.begin(run(1).run_id)
        assert (first.attempt, second.attempt, second.status) == (1, 2, "running")
        assert first.started == second.started is not None

    def test_stopping_ends_what_waits_and_marks_what_runs(self, state: ServiceState) -> None:
        """The mark outlasts a restart; a run that has ended is left alone."""
        for number in (1, 2, 3):
            state.add(run(number))
        state.begin(run(2).run_id)
        state.end(run(3).run_id, "completed")
        assert [state.ask_to_stop(run(n).run_id).status for n in (1, 2, 3)] == ["stopped", "stopping", "completed"]

    def test_keeps_why_a_run_failed(self, state: ServiceState) -> None:
        """The error document comes back as it was."""
        state.add(run(1))
        ended = state.end(run(1).run_id, "failed", {"code": "run-failed", "message": "no"})
        assert (ended.status, ended.problem) == ("failed", {"code": "run-failed", "message": "no"})
        assert ended.finished


class TestFile:
    def test_of_another_version_is_refused(self, tmp_path: Path) -> None:
        """Nothing is guessed about tables that this version did not make."""
        import sqlite3

        connection = sqlite3.connect(tmp_path / "service.db")
        connection.execute("PRAGMA user_version = 9")
        connection.execute("CREATE TABLE runs (x)")
        connection.close()
        with pytest.raises(RunError, match="another version"):
            ServiceState(tmp_path / "service.db")

    def test_that_is_no_database_is_refused(self, tmp_path: Path) -> None:
        """With the path, not with a trace."""
        (tmp_path / "service.db").write_bytes(b"not a database" * 100)
        with pytest.raises(RunError, match=r"service\.db cannot be used"):
            ServiceState(tmp_path / "service.db")

    def test_is_this_users_alone(self, state: ServiceState) -> None:
        """Authorizations and names of sites are nobody else's business."""
        assert state.path.stat().st_mode & 0o077 == 0


class TestFinding:
    RUNS = (run(0xABC, position=1), run(0xABD << 100, "lungs", position=2), run(0xABD << 64, "heart", position=3))

    @pytest.mark.parametrize(
        ("wanted", "place"), [("latest", 2), (f"{0xABC:032x}", 0), (f"{0xABD << 100:032x}"[:5], 1), ("lungs", 1)]
    )
    def test_takes_an_id_a_beginning_a_name_or_latest(self, wanted: str, place: int) -> None:
        assert find_run(self.RUNS, wanted) is self.RUNS[place]

    @pytest.mark.parametrize("wanted", ["heart", "00000"])
    def test_what_means_several_is_refused_with_their_ids(self, wanted: str) -> None:
        with pytest.raises(RunError, match="means 2 runs") as caught:
            find_run(self.RUNS, wanted)
        assert self.RUNS[0].run_id[:12] in caught.value.hint

    def test_what_is_near_is_proposed(self) -> None:
        with pytest.raises(RunError, match="no run `lung`") as caught:
            find_run(self.RUNS, "lung")
        assert "`lungs`" in caught.value.hint

    def test_nothing_is_found_where_there_is_nothing(self) -> None:
        with pytest.raises(RunError, match="no runs yet"):
            find_run([], "latest")
