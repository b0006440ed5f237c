"""Runs under secure aggregation that stop at any instant: no update is asked for twice, and the run ends right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import RunError
from server import coordinator as coordinator_module
from server import stored as stored_module
from server.checkpoint import load_round
from server.coordinator import Outcome
from server.secagg.headers import FILE, Begun, Headers
from server.store import RunFolder
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.masked import Members, coordinate, masked
from tests.helpers.runs import Log, as_bytes, rows

CONFIG = masked(rounds=5, secagg={"epoch_rounds": 2})
CLIENTS = 5

LEGS = ["advertise", "exchange", "deposit", "inbox", "train", "agree", "unmask"]
BEFORE = ["started", *LEGS, "reply", "storing"]
"""Places at which no sum of round 3 is stored; a new epoch begins with it."""
AFTER = ["stored", "recorded", "saving", "saved"]


class Course:
    """One course of a run over several processes of the coordinator; the clients live on."""

    def __init__(self, path: Path, config: RunConfig = CONFIG, clients: int = CLIENTS) -> None:
        self.path, self.config, self.grid = path, config, Members(config, clients)

    def go(self, observer: Log | None = None) -> tuple[Outcome, Log]:
        log = observer or Log()
        exists = (self.path / "run.toml").exists()
        with RunFolder.resume(self.path) if exists else RunFolder.create(self.config, self.path) as folder:
            return coordinate(self.config, self.grid, folder=folder, observer=log), log

    def stop(self, place: str, *, answered: int = 2) -> None:
        """End the process at a place of round 3: in a leg, after so many clients got its message."""
        with pytest.MonkeyPatch.context() as patch:
            observer = Stopping(place, 3) if place in {"started", "reply", "recorded"} else Log()
            if place in LEGS:
                self._stop_in(place, patch, answered)
            for module, names in ((stored_module, ("storing", "stored")), (coordinator_module, ("saving", "saved"))):
                if place in names:
                    self._stop_around(module, patch, before=place == names[0])
            with pytest.raises(StoppedError):
                self.go(observer)

    def _stop_in(self, leg: str, patch: pytest.MonkeyPatch, answered: int) -> None:
        heard: list[str] = []

        def faults(name: str, kind: str, server_round: int) -> None:
            # A set-up of round 3's epoch rides on the messages of round 2.
            if kind == leg and server_round == (3 if leg in {"inbox", "train", "agree", "unmask"} else 2):
                heard.append(name)
                if len(heard) > answered:
                    raise StoppedError

        patch.setattr(self.grid, "faults", faults)

    @staticmethod
    def _stop_around(module: Any, patch: pytest.MonkeyPatch, *, before: bool) -> None:
        original = module.save_checkpoint

        def stopping(folder: Path, checkpoint: Any) -> None:
            if checkpoint.server_round == 3 and before:
                raise StoppedError
            original(folder, checkpoint)
            if checkpoint.server_round == 3:
                raise StoppedError

        patch.setattr(module, "save_checkpoint", stopping)

    def trained(self, server_round: int) -> int:
        return sum(r == server_round for _, r in self.grid.trained)


class TestStopped:
    @pytest.mark.parametrize("place", BEFORE)
    @pytest.mark.parametrize("answered", [0, 2, 4])
    def test_before_its_sum_is_stored_a_round_is_made_again(self, place: str, answered: int, tmp_path: Path) -> None:
        """Resumed, the run does every round, with every client's update in each; nobody trained from one model twice,
        but where the round that did was burnt.
        """
        course = Course(tmp_path)
        course.stop(place, answered=answered)
        outcome, log = course.go()
        assert outcome.rounds == 5
        assert rows(tmp_path) == [1, 2, 3, 4, 5]
        assert all(record.survivors == course.grid.names for record in log.records)
        for journal in course.grid.journals.values():
            for use in journal.written:
                again = [other for other in journal.written if other.base == use.base]
                assert all(journal.statements[other.header] for other in again[:-1])

    @pytest.mark.parametrize("place", AFTER)
    def test_after_its_sum_is_stored_nobody_is_asked_again(self, place: str, tmp_path: Path) -> None:
        """The stored sum is used: no client trains for that round again, and model and later rounds come out as if
        nothing had happened, to the bit.
        """
        whole, course = Course(tmp_path / "whole"), Course(tmp_path / "run")
        expected, records = whole.go()
        course.stop(place)
        outcome, log = course.go()
        assert course.trained(3) == CLIENTS
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        told = [(r.server_round, r.cohort, r.survivors, r.train_loss) for r in log.records]
        assert told == [(r.server_round, r.cohort, r.survivors, r.train_loss) for r in records.records[-len(told) :]]
        third = next((record for record in log.records if record.server_round == 3), None)
        assert third is None or third.aggregation == records.records[2].aggregation

    @pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian", "krum"])
    def test_groups_are_taken_up_in_their_order(self, name: str, tmp_path: Path) -> None:
        """Stored sums of several groups reach the strategy as they did: the same bytes come of them."""
        config = masked(rounds=4, strategy={"name": name}, secagg={"group_size": 4, "honest": 2, "epoch_rounds": 4})
        course = Course(tmp_path, config, 13)
        course.grid.change = lambda site, server_round: 1 / (3 + int(site[-2:])) ** server_round
        after = []
        for _ in range(2):
            course.stop("saved")
            checkpoint = load_round(tmp_path / "checkpoints", 3, config.digest())
            assert checkpoint is not None
            after.append(as_bytes({**checkpoint.arrays, **checkpoint.strategy}))
            (tmp_path / "checkpoints" / "round-00003.safetensors").unlink()
        assert course.trained(3) == 13
        assert after[0] == after[1]

    def test_of_a_model_that_was_moved_is_taken_up_from_there(self, tmp_path: Path) -> None:
        """Where a lost round had the model moved, a stored sum is added to what it was moved to."""
        course = Course(tmp_path)
        course.stop("unmask", answered=4)
        after = []
        for _ in range(2):
            course.stop("saved")
            checkpoint = load_round(tmp_path / "checkpoints", 3, CONFIG.digest())
            assert checkpoint is not None
            after.append(as_bytes(dict(checkpoint.arrays)))
            (tmp_path / "checkpoints" / "round-00003.safetensors").unlink()
        assert course.trained(3) == 2 * CLIENTS
        assert after[0] == after[1]

    def test_with_its_sum_damaged_it_ends(self, tmp_path: Path) -> None:
        """Nothing may take the place of a sum that was opened and cannot be read."""
        course = Course(tmp_path)
        course.stop("recorded")
        (path,) = tmp_path.rglob("opened/round-00003*")
        path.write_bytes(b"")
        with pytest.raises(RunError, match="damaged"):
            course.go()

    def test_clients_that_died_with_it_take_part_again(self, tmp_path: Path) -> None:
        """Where all clients were restarted too, only their journals know the round: they state that it is burnt, or
        the model is moved.
        """
        for place in ("train", "agree", "unmask"):
            course = Course(tmp_path / place)
            course.stop(place, answered=4)
            for name in course.grid.names:
                course.grid.restart(name)
            outcome, log = course.go()
            assert outcome.rounds == 5
            assert all(record.survivors == course.grid.names for record in log.records)

    def test_epochs_are_counted_on(self, tmp_path: Path) -> None:
        """A resumed run's records do not count its set-ups from one again."""
        course = Course(tmp_path)
        course.stop("started")
        _, log = course.go()
        assert [r.aggregation and (r.aggregation.epoch, r.aggregation.index) for r in log.records] == [
            (2, 1),
            (2, 2),
            (3, 1),
        ]


class TestHeaders:
    BEGUN = Begun(header=b"h" * 32, base=b"b" * 32, participants=("site-00", "site-01"), epoch=3)

    def test_outlive_the_process(self, tmp_path: Path) -> None:
        """What was begun and what was burnt is known to the next process, whole lines only."""
        headers = Headers(tmp_path)
        headers.begin([self.BEGUN])
        headers.burn(self.BEGUN.header, b"certificate")
        with (tmp_path / FILE).open("ab") as file:
            file.write(b'{"header": "00')
        again = Headers(tmp_path)
        assert again.of(b"b" * 32) == [self.BEGUN]
        assert again.of(b"c" * 32) == []
        assert again.certificate(self.BEGUN.header) == b"certificate"
        assert again.epoch == 3
        again.begin([self.BEGUN])
        assert len(Headers(tmp_path).of(b"b" * 32)) == 2

    @pytest.mark.parametrize("line", [b"[]\n", b"{}\n", b'{"header": 3}\n', b"nonsense\n", b'{"header": "zz"}\n'])
    def test_damaged_are_refused(self, line: bytes, tmp_path: Path) -> None:
        """A run whose rounds cannot be read does not go on: a site might be asked for an update twice."""
        (tmp_path / FILE).write_bytes(line)
        with pytest.raises(RunError, match="damaged"):
            Headers(tmp_path)

    def test_full_disk_asks_nobody(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cannot be written down is not begun."""

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        course = Course(tmp_path)
        monkeypatch.setattr("server.secagg.headers.os.fsync", full)
        with pytest.raises(RunError, match="cannot be written"):
            course.go()
        assert course.grid.trained == []
