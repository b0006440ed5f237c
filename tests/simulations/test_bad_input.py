"""What cannot work is refused before anything starts: a stable code, an error, a hint, and no trace of it on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.data.builtin import heart
from server.checkpoint import checkpoint_files
from tests.helpers.processes import coterie
from tests.helpers.runs import SITE, tree

OWN_SITE = """
[models.no-such-file]
source = "missing.py:build"
[data.icu]
source = "csv:icu.csv"
label = "outcome"
features = ["age", "pulse"]
classes = ["well", "ill"]
"""
TABLE = "age,pulse,outcome\n" + "".join(f"{40 + i},{60 + i},{'well' if i % 2 else 'ill'}\n" for i in range(40))


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(tomli_w.dumps(tree()))
    Path("icu.csv").write_text(TABLE)
    Path("site.toml").write_text(OWN_SITE)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that has to be refused; what it said. Runs that were there before stay as they are."""
    assert coterie("simulate", "tiny.toml", "--site", SITE, "--workers", "1", "--root", "runs", "--quiet") == 0
    capsys.readouterr()

    def refuse(exit_code: int, *words: str | Path, site: str | Path = SITE) -> str:
        before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
        assert coterie("simulate", "--workers", "1", *words, "--site", site, "--root", "runs") == exit_code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert "\nhint: " in err
        assert "Traceback" not in err
        assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
        return str(err)

    return refuse


class TestConfiguration:
    @pytest.mark.parametrize(
        ("setting", "named"),
        [
            ("rounds=0", "rounds"),
            ("rouns=3", "did you mean `rounds`"),
            ("training.learning_rat=0.1", "did you mean `training.learning_rate`"),
            ("data.clients=-1", "data.clients"),
            ("data.alpha=0", "data.alpha"),
            ("data.alpha=-1.0", "data.alpha"),
            ("data.alpha=inf", "data.alpha"),
            ("privacy.target_delta=1", "privacy.target_delta"),
            ("privacy.sampling_rate=1.5", "privacy.sampling_rate"),
            ("privacy.sampling_rate=0", "privacy.sampling_rate"),
            ("training.learning_rate=nan", "training.learning_rate"),
            ("strategy.name=fedsgd", "strategy.name"),
            ("data.sites=['../../etc']", "data.sites"),
            ("model.name='a/b.py:f'", "model.name"),
            ("rounds", "expected key=value"),
            ("privacy.unit=example", "privacy.target_epsilon"),
            ("data.folds=1", "data.folds"),
            ("comparison.enabled=true", "comparison.enabled"),
            ("cohort.size=9", "cohort.size is 9"),
            ("strategy.name=krum", None),
        ],
    )
    def test_impossible_setting(self, setting: str, named: str | None, refused: Any) -> None:
        """A wrong key or an impossible value is named, with the nearest known key; exit 3."""
        extra = ["--set", "strategy.malicious_clients=1"] if setting == "strategy.name=krum" else []
        assert (named or "krum") in refused(3, "tiny.toml", "--set", setting, *extra)

    def test_clients_below_one_where_nothing_fills_them(self, refused: Any) -> None:
        """0 clients are possible only where the data has groups of its own."""
        assert "data.clients" in refused(3, "tiny.toml", "--set", "data.clients=0", "--set", "data.partition=iid")

    @pytest.mark.parametrize("setting", ["data.partition=iid", "data.pooled=true"])
    def test_comparison_without_sites(self, setting: str, refused: Any) -> None:
        """A comparison of sites needs sites: told before the run, not after it."""
        words = ["--set", "comparison.enabled=true", "--set", "data.folds=2", "--set", setting]
        assert "comparison.enabled" in refused(3, "tiny.toml", *words)

    @pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5", ""])
    def test_workers(self, workers: str, refused: Any) -> None:
        """The number of workers is a number from 1, or auto."""
        assert "--workers" in refused(3, "tiny.toml", "--workers", workers)

    def test_files(self, refused: Any, tmp_path: Path) -> None:
        """A file that is missing or no TOML, and a scenario that does not exist, are named."""
        Path("broken.toml").write_text("rounds = = 3")
        Path("binary.toml").write_bytes(b"\xff\xfe\x00")
        assert "did you mean the scenario `heart`" in refused(3, "hart")
        assert "nowhere.toml" in refused(3, "nowhere.toml")
        assert "not valid TOML" in refused(3, "broken.toml")
        assert "not valid TOML" in refused(3, "binary.toml")
        assert "nothing to simulate" in refused(3)


class TestSiteAndModel:
    def test_site_file(self, refused: Any) -> None:
        """A registry that is missing, or names code that is missing, is refused with exit 4."""
        assert "cannot be read" in refused(4, "tiny.toml", site="nowhere.toml")
        words = ["--set", "data.name=icu", "--set", "data.partition=iid", "--set", "model.name=no-such-file"]
        assert "missing.py" in refused(4, "tiny.toml", *words, site="site.toml")

    @pytest.mark.parametrize("setting", ["model.name=cnn", "model.name=lstm", "model.name=tinny"])
    def test_model_that_does_not_fit(self, setting: str, refused: Any) -> None:
        """A model for other data, or one that nobody registered, is refused with exit 7."""
        refused(7, "tiny.toml", "--set", setting)

    def test_option_that_is_not_there(self, refused: Any) -> None:
        """A model's unknown option is named with the nearest one."""
        assert "did you mean `trouble`" in refused(7, "tiny.toml", "--set", "model.options.troubel=none")


class TestData:
    @pytest.mark.parametrize(
        "setting",
        [
            "data.name=an-empty-client", "data.name=labels-out-of-range", "data.name=odd-names",
            "data.name=nobody-knows", "data.clients=5000000", "data.sites=['client-07']",
        ],
    )  # fmt: skip
    def test_own_function(self, setting: str, refused: Any) -> None:
        """An empty client, labels out of range, impossible names, unknown data or sites: exit 5."""
        if setting == "data.clients=5000000":
            setting = "data.max_examples=-1"
            refused(3, "tiny.toml", "--set", setting)
        else:
            refused(5, "tiny.toml", "--set", setting)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (("age,pulse", "age,puls"), "pulse"),
            (("outcome\n", "result\n"), "outcome"),
            (("well", "unheard-of"), "classes"),
        ],
        ids=["a column that is not there", "no label column", "labels out of range"],
    )
    def test_table(self, change: tuple[str, str], named: str, refused: Any) -> None:
        """A table that does not hold what the registry says is refused with exit 5, quoting no record."""
        Path("icu.csv").write_text(TABLE.replace(*change))
        words = ["--set", "data.name=icu", "--set", "data.partition=iid", "--set", "model.name=linear"]
        err = refused(5, "tiny.toml", *words, site="site.toml")
        assert named in err
        assert "61" not in err

    def test_missing_file(self, refused: Any) -> None:
        """A data file that is not there is named."""
        Path("icu.csv").unlink()
        words = ["--set", "data.name=icu", "--set", "data.partition=iid", "--set", "model.name=linear"]
        assert "icu.csv" in refused(5, "tiny.toml", *words, site="site.toml")

    def test_more_clients_than_examples(self, refused: Any) -> None:
        """A partition that would leave a client empty is refused."""
        words = ["--set", "data.name=icu", "--set", "data.partition=iid", "--set", "model.name=linear"]
        refused(5, "tiny.toml", *words, "--set", "data.clients=100", site="site.toml")

    def test_corrupted_vendored_file(self, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Built-in data whose bytes changed is not trained on."""
        from common.data import pinned

        real = Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            data = real(path)
            return data[:-1] if path.name == "heart_disease_uci.csv" else data

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        for cached in (*vars(heart).values(), *vars(pinned).values()):
            getattr(cached, "cache_clear", lambda: None)()
        assert "heart_disease_uci.csv" in refused(5, "heart")


class TestFolders:
    def test_that_are_not_free(self, refused: Any) -> None:
        """A run is never written over another one, nor into a folder with other files."""
        run = next(Path("runs").iterdir())
        assert "already holds a run" in refused(9, "tiny.toml", "--out", run)
        Path("mine").mkdir()
        Path("mine/thesis.txt").write_text("all of it")
        assert "not empty" in refused(9, "tiny.toml", "--out", "mine")
        assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]

    def test_that_are_no_runs(self, refused: Any) -> None:
        """Only a run can be resumed."""
        Path("mine").mkdir()
        assert "there is no run `mine`" in refused(9, "--resume", "mine")
        assert "there is no run `nowhere`" in refused(9, "--resume", "nowhere")

    def test_checkpoint_of_another_configuration(self, refused: Any) -> None:
        """A run whose configuration was changed under its checkpoints is not continued."""
        run = next(Path("runs").iterdir())
        (run / "result.json").unlink()
        text = (run / "run.toml").read_text()
        (run / "run.toml").write_text(text.replace("learning_rate = 0.3", "learning_rate = 0.4"))
        assert "another configuration" in refused(9, "--resume", run)

    def test_damaged_checkpoints(self, refused: Any) -> None:
        """A run all of whose checkpoints are damaged is not continued from the start in silence."""
        run = next(Path("runs").iterdir())
        (run / "result.json").unlink()
        for _, path in checkpoint_files(run / "checkpoints"):
            path.write_bytes(path.read_bytes()[:-5])
        assert "no checkpoint that is whole" in refused(9, "--resume", run)


def test_errors_are_json_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json the error is the one document on stdout, with its stable code."""
    assert coterie("simulate", "tiny.toml", "--site", SITE, "--set", "rounds=0", "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == "config-invalid"
    assert document["error"]["exit_code"] == 3
    assert not Path("runs").exists()
