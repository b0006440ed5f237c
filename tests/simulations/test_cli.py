"""`coterie simulate` as a user types it: what it prints, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from common.data.builtin import heart
from common.privacy import Budget
from server.coordinator import Coordinator
from server.store import RunFolder
from simulations.comparison import read_results
from simulations.ledgers import SimulatedLedgers
from tests.helpers.processes import coterie, started
from tests.helpers.runs import SITE, rows, tree


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def write(**changes: Any) -> Path:
    path = Path("tiny.toml")
    path.write_text(tomli_w.dumps(tree(**changes)))
    return path


def simulate(*arguments: str | Path) -> int:
    return coterie("simulate", *arguments, "--site", SITE, "--workers", "1")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PRIVATE = {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3}


class TestRunFolder:
    def test_holds_all_that_a_run_leaves(self) -> None:
        """Configuration, result, model, rounds, events, report and checkpoints are in the folder that --out names."""
        assert simulate(write(), "--out", "here") == 0
        folder = Path("here")
        assert {path.name for path in folder.iterdir()} >= {
            "run.toml", "result.json", "model.safetensors", "rounds.jsonl", "events", "report.html", "checkpoints",
        }  # fmt: skip
        assert list((folder / "events").iterdir())
        assert rows(folder) == [1, 2, 3]
        assert sorted(load_file(folder / "model.safetensors")) == ["layer.bias", "layer.weight"]
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
        assert RunFolder.open(folder).status == "completed"
        assert "<html" in (folder / "report.html").read_text()

    def test_is_a_new_one_below_the_root(self) -> None:
        """Without --out every run has a folder of its own, named after the run."""
        for _ in range(2):
            assert simulate(write(), "--root", "all") == 0
        names = sorted(path.name for path in Path("all").iterdir())
        assert len(names) == 2
        assert all("-tiny" in name for name in names)

    def test_simulated_ledgers_are_in_it(self) -> None:
        """With privacy each client's ledger is in one store in the run's folder, an event a round."""
        assert simulate(write(privacy=PRIVATE, training={"local_steps": 1}), "--out", "here") == 0
        store = SimulatedLedgers(Path("here/ledgers.db"), Budget.opened(5.0, 1e-5))
        assert [len(store.of(f"client-{i:02d}").events()) for i in range(4)] == [3] * 4
        assert not Path("here/spool").exists(), "nobody asks for stored updates again"
        last = RunFolder.open(Path("here")).rounds()[-1]
        result = json.loads(Path("here/result.json").read_text())
        assert last["epsilon"] == result["privacy"]["epsilon"]
        assert all(0 < spent <= 5 for spent in last["epsilon"].values())

    def test_a_private_run_with_fixed_noise_repeats_to_the_bit(self, capsys: pytest.CaptureFixture[str]) -> None:
        """With one worker or two, and says that it protects nobody; with secure noise no two runs are alike."""
        source = write(privacy=PRIVATE, training={"local_steps": 1})
        fixed = ("--insecure-fixed-noise", "7")
        assert simulate(source, "--out", "a", *fixed) == 0
        assert "protects nobody" in capsys.readouterr().err
        assert coterie("simulate", source, "--site", SITE, "--workers", "2", "--out", "b", *fixed) == 0
        assert simulate(source, "--out", "c", "--insecure-fixed-noise", "8") == 0
        assert simulate(source, "--out", "d") == 0
        models = [Path(name, "model.safetensors").read_bytes() for name in "abcd"]
        assert models[0] == models[1]
        assert len(set(models)) == 3
        insecure = [
            json.loads(Path(name, "result.json").read_text())["privacy"]["insecure_fixed_noise"] for name in "ad"
        ]
        assert insecure == [True, False]

    def test_can_be_predicted_with_and_exported(self, capsys: pytest.CaptureFixture[str]) -> None:
        """`coterie predict` and `coterie export` use the model that a simulation left."""
        assert coterie("simulate", "heart", "--set", "comparison.enabled=false", "--set", "rounds=3", "--out", "h") == 0
        csv = Path(heart.__file__).parents[1] / "files" / "heart_disease_uci.csv"
        capsys.readouterr()
        assert coterie("predict", "h", "--data", f"csv:{csv}", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["accuracy"] > 0.6
        assert len(document["predictions"]) == document["rows"] > 900
        assert coterie("export", "h", "--to", "safetensors") == 0
        assert Path("h/model-with-schema.safetensors").stat().st_size > 0


class TestOutput:
    def test_json_is_one_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--json prints one JSON document on stdout, and nothing on stderr, with the result and where it is."""
        assert simulate(write(), "--out", "here", "--json") == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert err == ""
        assert document["folder"] == "here"
        assert document["status"] == "completed"
        assert 0.6 < document["accuracy"] <= 1
        assert document["privacy"] is None
        assert document["comparison"] is None
        assert sorted(document["clients"]) == [f"client-{i:02d}" for i in range(4)]
        stored = json.loads(Path("here/result.json").read_text())
        assert {**document, "folder": None} == {**stored, "folder": None}

    def test_real_process_prints_the_same(self, tmp_path: Path) -> None:
        """The installed command, in a process of its own with two workers: one document on stdout, silent stderr."""
        arguments = ["simulate", str(write()), "--site", str(SITE), "--workers", "2", "--out", "here", "--json"]
        with started(arguments, folder=tmp_path) as process:
            out, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, "")
        assert json.loads(out)["status"] == "completed"

    def test_table_answers_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without --json a person reads accuracy, rounds, privacy, and the report's place; no progress off-terminal."""
        assert simulate(write(), "--out", "here") == 0
        out, err = capsys.readouterr()
        assert all(word in out for word in ("accuracy", "rounds", "none: updates may reveal", "here/report.html"))
        assert err == ""

    def test_table_of_a_private_run_names_unit_and_relation(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Wherever an epsilon is shown, its delta, privacy unit and neighbouring relation stand beside it."""
        assert simulate(write(privacy=PRIVATE, training={"local_steps": 1}), "--out", "here", "--quiet") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in ("epsilon", "delta 1e-05", "one example", "add/remove", "not released"))

    def test_options_of_the_command_line_override_the_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--set changes one value, --dp switches on privacy; the resolved configuration is in run.toml."""
        settings = ["rounds=2", "privacy.noise_multiplier=1.5", "training.local_steps=1"]
        words = [word for setting in settings for word in ("--set", setting)]
        assert simulate(write(), "--out", "here", "--dp", *words, "--json") == 0
        config = RunFolder.open(Path("here")).config()
        assert (config.rounds, config.privacy.unit, config.privacy.noise_multiplier) == (2, "example", 1.5)
        assert json.loads(capsys.readouterr().out)["privacy"]["noise_multiplier"] == 1.5


class TestOddRuns:
    def test_loss_that_overflows(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A model whose loss is not finite is still reported: null in JSON, no line in the table."""
        changes: dict[str, Any] = {
            "rounds": 1,
            "model": {"name": "mlp", "options": {}},
            "training": {"learning_rate": 1e28, "local_epochs": 0, "local_steps": 1},
        }
        for words in (["--json"], []):
            assert simulate(write(**changes), "--root", "all", *words) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[0])
        assert document["loss"] is None

    def test_no_held_out_examples(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without held-out examples no accuracy is claimed, not even 0."""
        data = {"name": "nothing-held-out"}
        assert simulate(write(data=data), "--out", "one", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["accuracy"] is None
        assert {client["accuracy"] for client in document["clients"].values()} == {None}
        assert simulate(write(data=data), "--out", "two") == 0
        assert "accuracy" not in capsys.readouterr().out

    def test_single_client(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One client alone is a run, too."""
        assert simulate(write(data={"clients": 1}), "--out", "one") == 0
        assert "accuracy" in capsys.readouterr().out

    def test_next_token_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Running text goes through the same run and report."""
        changes: dict[str, Any] = {
            "model": {"name": "lstm", "options": {"embedding": 8, "hidden": 8}},
            "data": {"name": "text", "clients": 0},
        }
        assert simulate(write(**changes), "--out", "one", "--json") == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] is not None


class TestResume:
    def stop(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        """Make the next run end where round `at` is judged."""
        real = Coordinator._judge

        def judge(self: Coordinator, server_round: int) -> Any:
            if server_round == at:
                monkeypatch.setattr(Coordinator, "_judge", real)
                raise error
            return real(self, server_round)

        monkeypatch.setattr(Coordinator, "_judge", judge)

    @pytest.mark.parametrize("at", [1, 3])
    def test_continues_an_interrupted_run(
        self, at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """An interruption exits with 130 and says how to go on; doing so ends where an uninterrupted run ends."""
        assert simulate(write(), "--out", "whole") == 0
        self.stop(monkeypatch, at, KeyboardInterrupt())
        capsys.readouterr()
        assert simulate(write(), "--out", "here") == 130
        err = capsys.readouterr().err
        assert "coterie simulate --resume here\n" in err
        assert coterie(*err.splitlines()[0].partition("coterie ")[2].split(), "--json") == 0
        assert json.loads(capsys.readouterr().out)["rounds"] == 3
        assert Path("here/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
        assert rows(Path("here")) == [1, 2, 3]

    def test_finds_the_run_by_its_name_or_as_the_latest(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A run below --root needs no path."""
        for name in ("one", "two"):
            self.stop(monkeypatch, 1, KeyboardInterrupt())
            assert simulate(write(), "--out", f"all/{name}") == 130
        for run, folder in (("one", "all/one"), ("latest", "all/two")):
            capsys.readouterr()
            assert coterie("simulate", "--resume", run, "--root", "all", "--site", SITE, "--json") == 0
            assert json.loads(capsys.readouterr().out)["folder"] == folder

    def test_complete_run_is_not_continued(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A finished run is left as it is, to the byte."""
        simulate(write(), "--out", "here")
        before = contents(Path("here"))
        capsys.readouterr()
        assert coterie("simulate", "--resume", "here", "--site", SITE) == 9
        assert "is complete" in capsys.readouterr().err
        assert contents(Path("here")) == before

    def test_changes_nothing_about_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--resume takes no scenario, no --set, no --dp and no --out."""
        simulate(write(), "--out", "here")
        for words in (["tiny.toml"], ["--set", "rounds=9"], ["--dp"], ["--out", "there"]):
            assert coterie("simulate", "--resume", "here", *words) == 3
        assert not Path("there").exists()
        assert "hint: " in capsys.readouterr().err

    def test_interrupted_comparison_keeps_its_results(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What a comparison had done before an interruption is not done again, also after a line was cut off."""
        words = ["--set", "data.folds=2", "--set", "comparison.enabled=true", "--set", "data.clients=2"]
        with monkeypatch.context() as patch:
            patch.setattr("simulations.comparison._run_one", stop_after(3))
            assert simulate(write(), "--out", "here", *words) == 130
        results = Path("here/comparison.jsonl")
        kept = results.read_text()
        assert kept.count("\n") == 4  # the run itself is one
        results.write_text(kept + kept[:50])
        monkeypatch.setattr("simulations.comparison._run_one", counted := stop_after(1000))
        capsys.readouterr()
        assert simulate("--resume", "here", "--json") == 0
        assert counted.calls == 8 - 4
        assert sorted(json.loads(capsys.readouterr().out)["alone"]) == ["client-00", "client-01"]
        assert results.read_text().startswith(kept)
        assert len(read_results(results)) == 8  # the cut-off line spoilt none after it


class stop_after:  # noqa: N801 - used as a function
    """Trains `most` arms for real, then is interrupted."""

    def __init__(self, most: int) -> None:
        from simulations.comparison import _run_one

        self.calls, self._most, self._real = 0, most, _run_one

    def __call__(self, job: Any) -> Any:
        if self.calls == self._most:
            raise KeyboardInterrupt
        self.calls += 1
        return self._real(job)


class TestProgress:
    def test_is_silent_off_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A pipe gets the result and no bars, with --quiet or without."""
        for words in ([], ["--quiet"]):
            assert simulate(write(), "--root", "all", *words) == 0
            assert capfd.readouterr().err == ""
