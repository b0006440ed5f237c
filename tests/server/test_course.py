"""How a run ends, what it keeps on the way, and how it goes on."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any, ClassVar

import pytest

from common.errors import RunError
from server import coordinator as module
from server.checkpoint import checkpoint_files
from server.coordinator import Observer, RoundRecord
from server.store import RunFolder
from tests.helpers.coordinating import StoppedError, Stopping, coordinate, real_grid
from tests.helpers.runs import STRATEGIES, as_bytes, configuration, prepared, rows, run


class TestSelection:
    BUMPY: ClassVar[dict[str, Any]] = {
        "rounds": 8,
        "training": {"learning_rate": 40.0},
        "evaluation": {"select": "best"},
    }  # so large a step that accuracy goes up and down
    """A run whose best round is not its last."""

    def test_best_round_is_the_result(self, tmp_path: Path) -> None:
        """With `select = best` the result is the model of the earliest round with the highest accuracy."""
        last, log = run(tmp_path / "last", **{**self.BUMPY, "evaluation": {"select": "last"}})
        accuracies = [record.accuracy or 0.0 for record in log.records]
        best_round = accuracies.index(max(accuracies)) + 1
        assert best_round < 8
        outcome, _ = run(tmp_path / "best", **self.BUMPY)
        assert outcome.selected_round == best_round
        assert outcome.evaluation is not None
        assert outcome.evaluation.accuracy == max(accuracies)
        expected, _ = run(tmp_path / "short", **{**self.BUMPY, "rounds": best_round, "evaluation": {}})
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert last.selected_round == 8

    @pytest.mark.parametrize("stop", [2, 4, 6, 8])
    def test_best_round_outlives_a_stop(self, stop: int, tmp_path: Path) -> None:
        """A stop before or after the best round changes neither the choice nor its bytes."""
        expected, _ = run(tmp_path / "whole", **self.BUMPY)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", **self.BUMPY, observer=Stopping("recorded", stop))
        outcome, _ = run(tmp_path / "run", **self.BUMPY)
        assert (outcome.selected_round, outcome.evaluation) == (expected.selected_round, expected.evaluation)
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)

    def test_patience_stops_the_run(self, tmp_path: Path) -> None:
        """After as many evaluations without a better accuracy as `patience` says, the run stops and says so."""
        outcome, log = run(tmp_path / "run", rounds=50, evaluation={"patience": 3})
        accuracies = [record.accuracy or 0.0 for record in log.records]
        best = accuracies.index(max(accuracies))
        assert outcome.stopped_early
        assert outcome.rounds == len(accuracies) == best + 1 + 3 < 50

    def test_patience_counts_on_over_a_stop(self, tmp_path: Path) -> None:
        """A resumed run stops at the round at which the uninterrupted one stopped."""
        changes: dict[str, Any] = {"rounds": 50, "evaluation": {"patience": 3}}
        expected, _ = run(tmp_path / "whole", **changes)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", **changes, observer=Stopping("started", expected.rounds - 1))
        outcome, _ = run(tmp_path / "run", **changes)
        assert (outcome.rounds, outcome.stopped_early) == (expected.rounds, True)
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)

    def test_no_patience_never_stops(self, tmp_path: Path) -> None:
        """With patience 0 all rounds are made."""
        outcome, _ = run(tmp_path / "run", rounds=20)
        assert (outcome.rounds, outcome.stopped_early) == (20, False)

    @pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
    def test_last_model_is_judged_however_seldom_others_are(self, every: int, tmp_path: Path) -> None:
        """The evaluation of the result is that of the last model, whether or not its round was one for evaluating."""
        expected, _ = run(tmp_path / "each", rounds=5)
        outcome, log = run(tmp_path / "run", rounds=5, evaluation={"every": every})
        assert outcome.evaluation == expected.evaluation
        judged = [record.server_round for record in log.records if record.accuracy is not None]
        assert judged == [r for r in range(1, 6) if every and r % every == 0]

    @pytest.mark.parametrize("every", [0, 2])
    def test_finished_run_can_be_asked_again(self, every: int, tmp_path: Path) -> None:
        """Resuming after the last round trains nothing and gives the same outcome."""
        expected, _ = run(tmp_path / "run", evaluation={"every": every})
        outcome, log = run(tmp_path / "run", evaluation={"every": every})
        assert log.records == []
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert outcome.evaluation == expected.evaluation


class TestCheckpoints:
    def test_one_a_round_and_two_are_kept(self, tmp_path: Path) -> None:
        """Every round leaves a checkpoint; the newest two stay."""
        run(tmp_path / "run", rounds=5)
        assert [server_round for server_round, _ in checkpoint_files(tmp_path / "run" / "checkpoints")] == [4, 5]

    def test_damaged_newest_falls_back_to_the_one_before(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        """A run whose newest checkpoint was damaged repeats one round and ends with the same bytes, with a warning."""
        expected, _ = run(tmp_path / "whole")
        with pytest.raises(StoppedError):
            run(tmp_path / "run", observer=Stopping("started", 3))
        newest = checkpoint_files(tmp_path / "run" / "checkpoints")[-1][1]
        data = bytearray(newest.read_bytes())
        data[-3] ^= 1
        newest.write_bytes(data)
        outcome, log = run(tmp_path / "run")
        assert [record.server_round for record in log.records] == [2, 3]
        assert rows(tmp_path / "run") == [1, 2, 3]
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert "round-00002.safetensors is damaged" in capsys.readouterr().out

    def test_checkpoint_of_another_configuration_is_refused(self, tmp_path: Path) -> None:
        """A folder whose checkpoints belong to other settings is not continued, and stays as it was."""
        run(tmp_path / "run")
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(RunError, match="another configuration"):
            run(tmp_path / "run", seeds={"cohort": 5})
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    def test_disk_that_fills_up_leaves_a_run_to_resume(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A checkpoint that cannot be written ends the run with an error; resumed, it reaches the same bytes."""
        expected, _ = run(tmp_path / "whole")
        real, calls = module.save_checkpoint, []

        def full(folder: Path, checkpoint: Any) -> Path:
            calls.append(checkpoint.server_round)
            if len(calls) == 2:
                raise RunError("the disk is full", hint="free some space, then resume the run")
            return real(folder, checkpoint)

        monkeypatch.setattr(module, "save_checkpoint", full)
        with pytest.raises(RunError, match="disk is full"):
            run(tmp_path / "run")
        outcome, _ = run(tmp_path / "run")
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert rows(tmp_path / "run") == [1, 2, 3]

    def test_run_without_a_folder_keeps_nothing(self, tmp_path: Path) -> None:
        """Where no folder is given, the same result comes out and no file is written."""
        expected, _ = run(tmp_path / "run")
        possible = prepared(tmp_path / "nowhere")
        outcome = coordinate(possible, real_grid(possible))
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert not (tmp_path / "nowhere").exists()


class TestMemory:
    @pytest.mark.parametrize("name", ["fedavg", "fedadam", "krum"])
    def test_does_not_grow_with_rounds(self, name: str, tmp_path: Path) -> None:
        """After 25 rounds the coordinator holds what it held after 5, but for less than 1 % of a model a round."""
        config = configuration(
            rounds=25,
            model={"name": "wide", "options": {"megabytes": 1}},
            data={"clients": 5},
            strategy={"name": name, **STRATEGIES[name]},
            evaluation={"every": 0},
        )
        sizes: dict[int, int] = {}

        class Weighing(Observer):
            def round_finished(self, record: RoundRecord) -> None:
                if record.server_round in {5, 25}:
                    gc.collect()
                    sizes[record.server_round] = tracemalloc.get_traced_memory()[0]

        possible = prepared(tmp_path, config)
        with RunFolder.create(config, tmp_path / "run") as folder:
            tracemalloc.start()
            try:
                coordinate(possible, real_grid(possible), observer=Weighing(), folder=folder)
            finally:
                tracemalloc.stop()
        assert sizes[25] - sizes[5] < 20 * 2**20 / 100
