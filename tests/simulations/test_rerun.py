"""`coterie simulate --rerun`: a run folder repeats to the same bytes, or says where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import ConfigError, RunError
from simulations.rerun import original
from tests.helpers.processes import coterie
from tests.helpers.runs import SITE, tree

PRIVATE = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def first(*words: str, **changes: Any) -> Path:
    """A finished run."""
    Path("tiny.toml").write_text(tomli_w.dumps(tree(**changes)))
    out = Path("first")
    assert coterie("simulate", "tiny.toml", "--site", SITE, "--workers", "1", "--out", out, "--quiet", *words) == 0
    return out


def again(*words: str) -> int:
    return coterie("simulate", "--rerun", "first", "--out", "second", *words)


def same_model() -> bool:
    return Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()


class TestTheSameBytes:
    def test_of_a_plain_run_whatever_the_workers(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Scenario, settings and site.toml need not be named again; the answer says so."""
        first("--set", "seeds.model=3")
        capsys.readouterr()
        assert again("--workers", "2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["same_as"] == "first"
        assert same_model()

    def test_of_a_private_run_with_fixed_noise(self) -> None:
        """Seeds for data, cohorts, weights and order are in the configuration, that of the noise beside it."""
        first("--insecure-fixed-noise", "7", privacy=PRIVATE, training={"local_steps": 1})
        assert again("--workers", "2") == 0
        assert same_model()

    def test_of_a_sealed_run(self) -> None:
        """Keys are fresh, weights are not."""
        first("--sealed")
        assert again() == 0
        assert same_model()

    @pytest.mark.parametrize("batching", ["auto", "on"])
    def test_of_a_run_whose_clients_were_stacked(self, batching: str) -> None:
        """A round is trained the way it was trained, whatever is quicker today."""
        out = first("--batching", batching, model={"name": "linear", "options": {}}, data={"clients": 20}, rounds=6)
        record = json.loads((out / "batching.json").read_text())
        for probe in record["probes"]:  # as if the other way had been quicker
            probe["cpu_seconds"] = 1e9 if probe["stacked"] else 1e-9
        (out / "batching.json").write_text(json.dumps(record))
        assert again("--workers", "2") == 0
        assert same_model()
        assert json.loads(Path("second/batching.json").read_text())["stacked"] == record["stacked"]

    def test_of_a_run_on_a_clock(self) -> None:
        """Devices come from a seed of their own."""
        devices = {"examples_per_second": 10.0, "speed_spread": 1.0, "dropout": 0.3}
        first(simulation={"devices": devices}, data={"clients": 12}, cohort={"size": 5})
        assert again() == 0
        assert same_model()


class TestRefusals:
    def test_of_a_run_with_secure_noise(self) -> None:
        """Nobody can draw it again."""
        run = first(privacy=PRIVATE, training={"local_steps": 1})
        with pytest.raises(ConfigError, match="secure noise"):
            original(run)

    def test_of_a_run_that_is_not_complete(self) -> None:
        """It can be continued."""
        run = first()
        (run / "result.json").unlink()
        with pytest.raises(RunError, match="not complete") as refused:
            original(run)
        assert "--resume" in (refused.value.hint or "")

    @pytest.mark.parametrize("name", ["how.json", "batching.json"])
    def test_of_a_folder_in_which_something_is_damaged(self, name: str) -> None:
        """What decided the bytes cannot be guessed."""
        run = first()
        (run / name).write_text("{}")
        assert again() == RunError.exit_code

    @pytest.mark.parametrize("words", [("tiny.toml",), ("--set", "rounds=9"), ("--dp",), ("--batching", "on")])
    def test_of_changes(self, words: tuple[str, ...]) -> None:
        """A changed run is another one."""
        first()
        assert again(*words) == ConfigError.exit_code
        assert not Path("second").exists()

    def test_of_a_course_that_is_not_the_first_one_s(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The new folder stays, and the message says from which round on it differs."""
        run = first()
        lines = (run / "rounds.jsonl").read_text().splitlines()
        row = json.loads(lines[1])
        lines[1] = json.dumps(row | {"loss": row["loss"] + 1})
        (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
        assert again() == RunError.exit_code
        assert "round 2 was another one" in capsys.readouterr().err
        assert Path("second/result.json").is_file()

    def test_of_a_model_with_other_bytes(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Though every round's figures are the same."""
        run = first()
        path = run / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        assert again() == RunError.exit_code
        assert "its model has other bytes" in capsys.readouterr().err
