"""A run that is interrupted from outside, at any moment, goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import LedgerError
from server.checkpoint import checkpoint_files
from server.coordinator import Coordinator
from server.store import RunFolder
from simulations import workers
from simulations.inline import InlineGrid
from simulations.interrupt import interruptible
from simulations.workers import WorkerPool
from tests.helpers.pools import NAMES, counting_app, queries
from tests.helpers.processes import coterie, members, started, wait_until
from tests.helpers.runs import SITE, private, rows, tree
from tests.simulations.site_fixtures.parts import lose_an_interrupt

ROUNDS = 6
STEPS_A_ROUND = 10
"""Of the four clients together, which have 12, 15, 18 and 21 examples, in batches of 8."""
BLOCK = "COTERIE_TEST_BLOCK_AT"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tree(rounds=ROUNDS)))
    return path


@pytest.fixture
def whole(tmp_path: Path, config: Path) -> Path:
    """The run folder of a run that was never interrupted."""
    assert coterie("simulate", config, "--site", SITE, "--workers", "1", "--out", tmp_path / "whole", "--quiet") == 0
    return tmp_path / "whole"


def resume_and_compare(run: Path, whole: Path) -> None:
    """The resumed run ends with the same model, the same rows and the same figures."""
    assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows(run) == rows(whole) == list(range(1, ROUNDS + 1))
    for one, other in zip(RunFolder.open(run).rounds(), RunFolder.open(whole).rounds(), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    for key in ("status", "rounds", "selected_round", "accuracy", "loss", "clients", "privacy", "comparison"):
        assert results[0][key] == results[1][key]


class TestKill:
    """SIGKILL gives a process no chance to tidy up."""

    @pytest.mark.parametrize(("workers", "at"), [(1, 3 * STEPS_A_ROUND + 5), (2, 13)])
    def test_then_resume_gives_the_bytes_of_a_run_never_killed(
        self, workers: int, at: int, tmp_path: Path, config: Path, whole: Path
    ) -> None:
        """Killed in the middle of a round, in which a client will never answer, a run loses and repeats no row."""
        run = tmp_path / "run"
        arguments = ["simulate", str(config), "--site", str(SITE), "--out", str(run), "--workers", str(workers)]
        with started(arguments, folder=tmp_path, **{BLOCK: str(at)}) as process:
            enough = 3 if workers == 1 else 1
            wait_until(lambda: len(rows(run)) >= enough and checkpoint_files(run / "checkpoints"), process=process)
            process.kill()
            process.wait()
            wait_until(lambda: not members(process.pid))
        assert 1 <= len(rows(run)) < ROUNDS
        assert RunFolder.open(run).status == "interrupted"
        resume_and_compare(run, whole)

    def test_a_ledger_that_lost_events_meanwhile_ends_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without them, the epsilon shown for the whole run would be that of its last rounds."""
        path = tmp_path / "private.toml"
        path.write_text(tomli_w.dumps(private(rounds=4).model_dump(mode="json", exclude_none=True)))
        run, judged = tmp_path / "run", Coordinator._judge

        def stop(self: Coordinator, server_round: int) -> Any:
            if server_round == 3:
                raise KeyboardInterrupt
            return judged(self, server_round)

        monkeypatch.setattr(Coordinator, "_judge", stop)
        assert coterie("simulate", path, "--site", SITE, "--workers", "1", "--out", run, "--quiet") == 130
        monkeypatch.undo()
        ledger = run / "ledger" / "client-02.jsonl"
        whole = ledger.read_bytes()
        for shorter in (b"", whole[: whole.index(b"\n") + 1]):
            ledger.write_bytes(shorter)
            capsys.readouterr()
            assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == LedgerError.exit_code
            assert "the ledger of client-02 holds less than the run had spent" in capsys.readouterr().err
        ledger.write_bytes(whole)
        assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == 0


class TestControlC:
    def test_stops_everything_says_how_to_go_on_and_leaves_a_resumable_run(
        self, tmp_path: Path, config: Path, whole: Path
    ) -> None:
        """Ctrl-C in a terminal, which reaches every process of the group: exit 130, no worker left, a hint that works,
        no traceback.
        """
        run = tmp_path / "run"
        arguments = ["simulate", str(config), "--site", str(SITE), "--out", str(run), "--workers", "2"]
        with started(arguments, folder=tmp_path, **{BLOCK: "13"}) as process:
            wait_until(lambda: len(rows(run)) >= 1, process=process)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=240)
            wait_until(lambda: not members(process.pid))
        assert process.returncode == 130
        assert out == ""
        assert err == f"interrupted; continue with: coterie simulate --resume {run} --site {SITE}\n"
        assert not (run / "result.json").exists()
        resume_and_compare(run, whole)

    def test_stops_also_where_python_drops_the_interrupt(
        self, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """An exception in a destructor is ignored: without being remembered, this Ctrl-C would not stop the run."""
        words = ["--site", str(SITE), "--workers", "1", "--set", "data.name=one-in-trouble"]
        words += ["--set", "model.options.trouble=interrupt", "--out", str(tmp_path / "run")]
        assert coterie("simulate", str(config), *words) == 130
        assert "interrupted; continue with:" in capsys.readouterr().err
        assert rows(tmp_path / "run") == []

    def test_ends_the_wait_for_a_client_that_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interrupt that was dropped after the pool had begun to wait is noticed by the next look."""
        pool = WorkerPool(counting_app, 1)
        grid = InlineGrid(pool, NAMES)
        monkeypatch.setattr(workers, "wait", lambda *_: lose_an_interrupt() or [])
        with interruptible(), pytest.raises(KeyboardInterrupt):
            list(grid.stream(queries(grid, {0: "hang"})))
        pool.close()
