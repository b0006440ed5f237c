"""`coterie data`: results on stdout, one JSON document, no record ever."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from common.data.pinned import FILES
from common.errors import DataError, DataUnavailableError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer reads a name that click will remove
    from typer.testing import CliRunner

    from common.data.cli import app


def run(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_names_every_data_set_and_how_to_get_it() -> None:
    """The names, whose data they are, and the command for those that are not here."""
    text = run("list")
    assert "heart (built-in, tabular, 918 rows, 4 groups)" in text
    assert "R. Detrano" in text
    assert "not on this machine: coterie data fetch sentiment" in text


def test_list_json_is_one_document(tmp_path: Path) -> None:
    """A site's own data are listed beside the built-in ones."""
    (tmp_path / "site.toml").write_text('[data.icu]\nsource = "csv:icu.csv"\n')
    found = json.loads(run("list", "--json", "--site", str(tmp_path / "site.toml")))
    assert {"name": "icu", "origin": "site", "available": False}.items() <= found[-1].items()


def test_check_counts_what_is_there() -> None:
    """Rows, drops, missing values, classes and groups."""
    found = json.loads(run("check", "heart", "--json"))
    assert (found["rows"], found["kept"]) == (920, 918)
    assert found["classes"] == {"healthy": 410, "disease": 508}
    assert found["groups"] == {"cleveland": 303, "hungary": 293, "switzerland": 123, "va-long-beach": 199}
    assert found["missing"]["chol"] == 201
    lines = [line.split() for line in run("check", "heart").splitlines()]
    assert ["rows:", "920,", "kept:", "918"] in lines
    assert ["chol", "201"] in lines


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_check_prints_no_record(tmp_path: Path, options: list[str]) -> None:
    """Neither cells nor row ids appear, only names of columns, classes and groups, and counts."""
    (tmp_path / "own.csv").write_text("id,x,outcome\n" + "".join(f"SECRET-{i},{9000 + i},{i % 2}\n" for i in range(30)))
    (tmp_path / "site.toml").write_text('[data.own]\nsource = "csv:own.csv"\nlabel = "outcome"\n')
    text = run("check", "own", "--site", str(tmp_path / "site.toml"), *options)
    assert "SECRET" not in text
    assert "90" not in text
    assert "30" in text


def test_check_counts_entities(tmp_path: Path) -> None:
    """How many there are and how many rows the largest has; no name or number of one."""
    rows = [f"SECRET-{i // 4},{i},{i % 2}\n" for i in range(29)] + [",1,1\n"]
    (tmp_path / "own.csv").write_text("who,x,label\n" + "".join(rows))
    (tmp_path / "site.toml").write_text('[data.own]\nsource = "csv:own.csv"\nentity = "who"\n')
    text = run("check", "own", "--site", str(tmp_path / "site.toml"))
    assert "entities: 8, most rows of one: 4\n" in text
    assert ["has", "no", "entity", "1"] in [line.split() for line in text.splitlines()]
    found = json.loads(run("check", "own", "--site", str(tmp_path / "site.toml"), "--json"))
    assert (found["entities"], found["largest_entity"]) == (8, 4)
    assert "SECRET" not in text + json.dumps(found)
    assert "entities" not in run("check", "heart")


def test_check_counts_running_text_and_own_functions(tmp_path: Path) -> None:
    """Running text has no classes; a function's federation is counted by client."""
    assert json.loads(run("check", "shakespeare", "--json"))["classes"] == {}
    (tmp_path / "mine.py").write_text(
        "from common.data import load_federation\nfrom common.site import Site\n"
        "def build(settings, seed):\n"
        "    heart = settings.model_copy(update={'name': 'heart', 'partition': 'natural', 'clients': 0})\n"
        "    return load_federation(heart, seed=seed, site=Site())\n"
    )
    (tmp_path / "site.toml").write_text('[data.own]\nsource = "python:mine.py:build"\n')
    found = json.loads(run("check", "own", "--site", str(tmp_path / "site.toml"), "--json"))
    assert found["rows"] == 918
    assert list(found["groups"]) == ["cleveland", "hungary", "switzerland", "va-long-beach"]


def test_fetch_says_where_the_data_are(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder on stdout; in JSON for scripts."""
    monkeypatch.setattr("common.data.fetch.ARTEFACTS", {"thing": ()})
    assert run("fetch", "thing") == f"thing is in {empty_cache / 'thing'}\n"
    assert json.loads(run("fetch", "thing", "--json")) == {"name": "thing", "folder": str(empty_cache / "thing")}


def test_errors_are_left_to_the_root_command() -> None:
    """It alone prints `error:` and `hint:` and chooses the exit code."""
    with pytest.raises(DataError, match="no data set"):
        run("check", "../etc")
    with pytest.raises(DataUnavailableError):
        run("check", "sentiment")


def test_attribution_names_every_file_hash_and_donor() -> None:
    """What comes with Coterie comes with its licence, and with the names its donors ask for."""
    from common.data.pinned import VENDORED

    text = (FILES / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert sorted(p.name for p in FILES.iterdir()) == sorted([*VENDORED, "ATTRIBUTION.md"])
    for fact in (*VENDORED, *VENDORED.values(), "Janosi", "Steinbrunn", "Pfisterer", "Detrano", "CC BY 4.0", "Zalando"):
        assert fact in text
