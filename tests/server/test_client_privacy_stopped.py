"""Runs under client-level privacy that stop at any instant: nothing is released twice, nothing goes unpaid."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import Strategy

from common.config import RunConfig
from common.errors import BudgetExhaustedError, RunError
from server import coordinator as coordinator_module
from server import stored as stored_module
from server.coordinator import Outcome
from server.store import RunFolder
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.releasing import (
    ADAPTIVE,
    FLAT,
    KINDS,
    MATRIX,
    POISSON,
    MemoryLedger,
    NoNoise,
    by_round,
    coordinate,
    fixed_noise,
    sites,
)
from tests.helpers.runs import Log, as_bytes, rows

every_kind = pytest.mark.parametrize("kind", KINDS)


class Failing(NoNoise):
    """Noise of a fixed key that ends the process at one draw, before or after taking it."""

    def __init__(self) -> None:
        self.inner = fixed_noise(11)
        self.drawn = 0

    def integers(self, count: int) -> Any:
        self.drawn += 1
        return self.inner.integers(count)


class Stop:
    """Ends a run of a folder at one place of round 3."""

    def __init__(self, place: str, patch: pytest.MonkeyPatch) -> None:
        self.observer = Stopping(place, 3) if place in {"started", "reply", "recorded"} else Log()
        match place:
            case "drawn":
                self._at(patch, stored_module, "save_checkpoint", before=True)
            case "stored":
                self._at(patch, stored_module, "save_checkpoint", before=False)
            case "saving":
                self._at(patch, coordinator_module, "save_checkpoint", before=True)
            case "saved":
                self._at(patch, coordinator_module, "save_checkpoint", before=False)
            case "stepping":
                original = coordinator_module.aggregate

                def step(strategy: Strategy, server_round: int, replies: Any) -> Any:
                    if server_round == 3:
                        raise StoppedError
                    return original(strategy, server_round, replies)

                patch.setattr(coordinator_module, "aggregate", step)

    @staticmethod
    def _at(patch: pytest.MonkeyPatch, module: Any, name: str, *, before: bool) -> None:
        original = getattr(module, name)

        def stopping(folder: Path, checkpoint: Any) -> Any:
            if checkpoint.server_round == 3 and before:
                raise StoppedError
            original(folder, checkpoint)
            if checkpoint.server_round == 3:
                raise StoppedError

        patch.setattr(module, name, stopping)


BEFORE = ["started", "reply", "drawn"]
"""Places at which nothing of round 3 has been released."""
AFTER = ["stored", "stepping", "recorded", "saving", "saved"]
"""Places at which it has, or may have been."""


class Course:
    """One course of a run over several processes: the same ledger, clients and noise."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        self.config, self.path = config, path
        self.grid, self.noise, self.ledger = sites(config), Failing(), MemoryLedger()

    def go(self, observer: Log | None = None) -> tuple[Outcome, Log]:
        log = observer or Log()
        exists = (self.path / "run.toml").exists()
        with RunFolder.resume(self.path) if exists else RunFolder.create(self.config, self.path) as folder:
            outcome = coordinate(
                self.config, self.grid, ledger=self.ledger, noise=self.noise, folder=folder, observer=log
            )
        return outcome, log

    def stop(self, place: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop(place, patch)
            with pytest.raises(StoppedError):
                self.go(stop.observer)

    def asked(self, server_round: int) -> int:
        return sum(asked == server_round for _, asked in self.grid.asked)


class TestStopped:
    @every_kind
    @pytest.mark.parametrize("place", AFTER)
    def test_after_its_release_a_round_is_not_made_again(self, kind: str, place: str, tmp_path: Path) -> None:
        """Resumed, the run takes up what was released: no client of that round is asked again, no noise drawn twice,
        nothing paid twice, and the model and every later round come out as if nothing had happened, to the bit.
        """
        config = KINDS[kind]
        whole, course = Course(config, tmp_path / "whole"), Course(config, tmp_path / "run")
        expected, records = whole.go()
        course.stop(place)
        asked = course.asked(3)
        outcome, log = course.go()
        assert course.asked(3) == asked == whole.asked(3)
        assert course.noise.drawn == whole.noise.drawn
        assert course.ledger.log == [f"reserve {t}" for t in range(1, config.rounds + 1)]
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert rows(tmp_path / "run") == list(range(1, config.rounds + 1))
        told = [(r.server_round, r.cohort, r.survivors, r.clipping_norm, r.within) for r in log.records]
        expected_told = [(r.server_round, r.cohort, r.survivors, r.clipping_norm, r.within) for r in records.records]
        assert told == expected_told[-len(told) :]
        assert told[0][0] == (4 if place == "saved" else 3)

    @every_kind
    @pytest.mark.parametrize("place", BEFORE[:2])
    def test_before_its_release_nothing_of_a_round_was_known(self, kind: str, place: str, tmp_path: Path) -> None:
        """Nothing was recorded or sent that depends on the noise of the interrupted round; it is made again, and
        correlated noise goes on from the rounds that were released.
        """
        course = Course(KINDS[kind], tmp_path)
        course.stop(place)
        assert course.asked(4) == 0
        assert rows(tmp_path) == [1, 2]
        assert not list(tmp_path.rglob("*round-00003*"))
        outcome, log = course.go()
        assert [record.server_round for record in log.records] == list(range(3, course.config.rounds + 1))
        assert course.ledger.log == [f"reserve {t}" for t in range(1, course.config.rounds + 1)]
        assert outcome.rounds == course.config.rounds

    @every_kind
    def test_between_paying_and_keeping_the_run_ends_with_the_model_so_far(self, kind: str, tmp_path: Path) -> None:
        """Nobody can tell a release that was never stored from one that was removed: the round has no second one."""
        course = Course(KINDS[kind], tmp_path)
        course.stop("drawn")
        outcome, log = course.go()
        assert (outcome.rounds, outcome.stopped_early, log.records) == (2, True, [])

    @pytest.mark.parametrize("config", [FLAT, ADAPTIVE, MATRIX, POISSON], ids=[*KINDS, "poisson"])
    @pytest.mark.parametrize("place", ["reply", *AFTER])
    def test_ends_the_same_where_everything_repeats(self, config: RunConfig, place: str, tmp_path: Path) -> None:
        """With clients that answer the same and noise that depends on the round alone, a stop anywhere changes no bit.

        Only simulations have such noise.
        """
        courses = Course(config, tmp_path / "whole"), Course(config, tmp_path / "run")
        for course in courses:
            course.grid.change = lambda name, server_round, _: 0.01 * int(name.removeprefix("node-")) * server_round
            course.noise = by_round  # type: ignore[assignment]
        expected, _ = courses[0].go()
        courses[1].stop(place)
        outcome, _ = courses[1].go()
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)

    @pytest.mark.parametrize(("place", "events"), [("drawn", 5), ("stored", 4), ("saved", 4)])
    def test_costs_at_most_one_event_where_rounds_have_theirs(self, place: str, events: int, tmp_path: Path) -> None:
        """A stop between paying and keeping costs that round's event once more; anywhere else nothing."""
        course = Course(POISSON, tmp_path)
        course.stop(place)
        course.go()
        assert len(course.ledger.events()) == events

    @pytest.mark.parametrize("removed", ["released/*", "round*", "**/*.safetensors"])
    def test_with_its_files_removed_it_releases_no_round_twice(self, removed: str, tmp_path: Path) -> None:
        """The ledger knows which rounds were paid for: it ends with the model that is left, or without one."""
        course = Course(FLAT, tmp_path)
        course.stop("recorded")
        for path in (tmp_path / "checkpoints").glob(removed):
            path.unlink()
        drawn = course.noise.drawn
        with suppress(BudgetExhaustedError):
            outcome, _ = course.go()
            assert outcome.stopped_early
        assert course.noise.drawn == drawn
        assert course.ledger.log == [f"reserve {t}" for t in range(1, len(course.ledger.log) + 1)]

    def test_with_its_newest_checkpoint_damaged_repeats_no_draw(self, tmp_path: Path) -> None:
        """Falling back a checkpoint, the run replays what it had released since."""
        whole, course = Course(MATRIX, tmp_path / "whole"), Course(MATRIX, tmp_path / "run")
        expected, _ = whole.go()
        with pytest.raises(StoppedError):
            course.go(Stopping("started", 6))
        newest = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
        newest.write_bytes(newest.read_bytes()[:-9])
        outcome, _ = course.go()
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert course.noise.drawn == whole.noise.drawn

    def test_with_its_release_damaged_it_ends(self, tmp_path: Path) -> None:
        """A released round whose release cannot be read is not released a second time."""
        course = Course(MATRIX, tmp_path)
        course.stop("recorded")
        (path,) = tmp_path.rglob("released/round-00003*")
        path.write_bytes(b"")
        with pytest.raises(RunError, match="damaged"):
            course.go()
        assert course.noise.drawn == 3

    def test_with_no_update_ever_has_no_model(self, tmp_path: Path) -> None:
        """A run in which no client ever sent an update ends in an error, also resumed: its model is noise."""
        for _ in range(2):
            course = Course(FLAT, tmp_path)
            course.grid.absent = lambda *_: True
            with pytest.raises(RunError, match="no client sent an update"):
                course.go()
