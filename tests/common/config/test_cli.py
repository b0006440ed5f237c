"""`coterie config`, through the same entry point as a person's shell."""

import json
import subprocess
import sys

import pytest

from common.cli import main
from common.config import RunConfig, load_config
from common.config.load import known_keys


@pytest.fixture
def coterie(capsys):
    """Run a command; its exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


class TestInit:
    """`coterie config init` writes a complete file."""

    def test_it_writes_a_file_that_loads_back_equal(self, coterie, tmp_path):
        """Defaults, a scenario or overrides alike; hints go to stderr."""
        path = tmp_path / "run.toml"
        code, out, err = coterie("config", "init", "heart", "--set", "rounds=3", "--out", str(path))
        assert (code, out) == (0, "")
        assert str(path) in err
        assert load_config(path).config == load_config("heart", ["rounds=3"]).config

    def test_it_does_not_overwrite_unless_forced(self, coterie, tmp_path):
        """Destroying a file needs a flag."""
        path = tmp_path / "run.toml"
        path.write_text("mine")
        code, _, err = coterie("config", "init", "--out", str(path))
        assert code == 3
        assert "--force" in err
        assert path.read_text() == "mine"
        assert coterie("config", "init", "--out", str(path), "--force")[0] == 0
        assert load_config(path).config == RunConfig()

    def test_a_place_that_cannot_be_written_is_an_error_with_a_hint(self, coterie, tmp_path):
        """No traceback."""
        code, out, err = coterie("config", "init", "--out", str(tmp_path / "no" / "run.toml"))
        assert (code, out) == (3, "")
        assert err.startswith("error: ")


class TestShow:
    """`coterie config show` explains a run."""

    def test_it_prints_one_json_document_with_values_and_origins(self, coterie):
        """Nothing else on stdout, nothing on stderr."""
        code, out, err = coterie("config", "show", "heart", "--set", "rounds=3", "--json")
        document = json.loads(out)
        assert (code, err) == (0, "")
        assert document["settings"]["rounds"] == {"value": 3, "from": "--set"}
        assert document["settings"]["name"] == {"value": "heart", "from": "heart"}
        assert document["settings"]["privacy.max_grad_norm"]["value"] == 1.0
        assert document["digest"] == load_config("heart", ["rounds=3"]).config.digest()

    def test_its_table_names_every_setting(self, coterie, monkeypatch):
        """For people."""
        monkeypatch.setenv("COLUMNS", "300")
        code, out, _ = coterie("config", "show", "--set", "model.options.hidden=8")
        first_words = {line.split()[0] for line in out.splitlines() if line.strip()}
        assert code == 0
        assert set(known_keys()) - {"model.options"} <= first_words
        assert "model.options.hidden" in first_words


class TestErrors:
    """What is wrong goes to stderr, how to mend it follows, and scripts get a code."""

    WRONG = ("config", "show", "--set", "training.lernrate=1")

    def test_an_error_and_its_hint_go_to_stderr(self, coterie):
        """`error:` then `hint:`; the exit code is that of the kind of error."""
        code, out, err = coterie(*self.WRONG)
        first, second = err.splitlines()
        assert (code, out) == (3, "")
        assert first.startswith("error: ")
        assert second.startswith("hint: ")
        assert "training.learning_rate" in second

    def test_with_json_the_error_is_the_one_document(self, coterie):
        """A script needs no second parser."""
        code, out, _ = coterie(*self.WRONG, "--json")
        error = json.loads(out)["error"]
        assert code == error["exit_code"] == 3
        assert error["code"] == "config-invalid"
        assert "lernrate" in error["message"]
        assert "learning_rate" in error["hint"]

    @pytest.mark.parametrize("words", [("config", "shwo"), ("nonsense",), ("config", "show", "--nonsense")])
    def test_a_mistake_on_the_command_line_exits_with_2(self, coterie, words):
        """As every command does; and reads like every error, for scripts too."""
        code, out, err = coterie(*words)
        assert (code, out) == (2, "")
        assert [line.split()[0] for line in err.splitlines()] == ["error:", "hint:"]
        code, out, _ = coterie(*words, "--json")
        assert (code, json.loads(out)["error"]["exit_code"]) == (2, 2)

    def test_an_interruption_exits_with_130(self, coterie, monkeypatch):
        """Without a traceback."""

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("common.cli.app", interrupted)
        code, out, err = coterie("config", "show")
        assert (code, out, err) == (130, "", "error: interrupted\n")
        code, out, _ = coterie("config", "show", "--json")
        assert (code, json.loads(out)["error"]["code"]) == (130, "interrupted")

    def test_help_lists_the_sub_commands(self, coterie):
        """Those of every installed package."""
        code, out, _ = coterie("--help")
        assert code == 0
        assert {"config", "data", "simulate"} <= {word for line in out.splitlines() for word in line.split()}

    def test_a_real_process_prints_no_traceback(self):
        """The same through a shell's eyes."""
        command = [sys.executable, "-m", "common.cli", "config", "show", "no-such-run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert json.loads(done.stdout)["error"]["code"] == "config-invalid"
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")
