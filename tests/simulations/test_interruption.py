"""A run that is interrupted from outside, at any moment, goes on as if it had not been."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import LedgerError
from server.checkpoint import checkpoint_files
from server.coordinator import Coordinator
from server.store import RunFolder
from tests.helpers.processes import coterie, members, started, wait_until
from tests.helpers.runs import SITE, private, rows, tree

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

    @pytest.fixture
    def stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder of a private run that was interrupted in its third round, when all clients had answered."""
        path = tmp_path / "private.toml"
        path.write_text(tomli_w.dumps(private(rounds=4).model_dump(mode="json", exclude_none=True)))
        run, judged = tmp_path / "run", Coordinator._judge

        def stop(self: Coordinator, server_round: int) -> Any:
            if server_round == 3:
                raise KeyboardInterrupt
            return judged(self, server_round)

        with monkeypatch.context() as patched:
            patched.setattr(Coordinator, "_judge", stop)
            assert coterie("simulate", path, "--site", SITE, "--workers", "1", "--out", run, "--quiet") == 130
        return run

    def test_a_ledger_that_lost_events_meanwhile_ends_the_run(
        self, stopped: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without them, the epsilon shown for the whole run would be that of its last rounds."""
        run = stopped
        store = run / "ledgers.db"
        with closing(sqlite3.connect(store)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("DELETE FROM records WHERE ledger = 'client-02'")
            connection.execute("DELETE FROM heads WHERE ledger = 'client-02'")
            connection.commit()
        capsys.readouterr()
        assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == LedgerError.exit_code
        assert "the ledger of client-02 holds less than the run had spent" in capsys.readouterr().err
        store.unlink()
        assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == LedgerError.exit_code

    def test_a_private_run_that_was_interrupted_pays_for_no_round_twice(self, stopped: Path) -> None:
        """Whoever had answered resends the stored update; nobody is refused the last round."""
        run = stopped
        assert coterie("simulate", "--resume", run, "--site", SITE, "--quiet") == 0
        result = json.loads((run / "result.json").read_text())
        assert result["missing"] == {}
        assert all(0 < spent <= 5 for spent in result["privacy"]["epsilon"].values())
