"""`coterie simulate` under secure aggregation, as a person meets it: warned, told, and never with a word too many."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from server.coordinator import Coordinator
from tests.helpers.processes import coterie, members, started, wait_until
from tests.helpers.runs import SITE, tree


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def simulate(*words: str | Path, **changes: Any) -> int:
    privacy = {"secure_aggregation": True, **changes.pop("privacy", {})}
    Path("tiny.toml").write_text(tomli_w.dumps(tree(privacy=privacy, **changes)))
    return coterie("simulate", "tiny.toml", "--site", SITE, "--workers", "1", "--out", "here", *words)


def test_a_person_is_warned_before_and_told_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    """Experimental, and no privacy by itself, on stderr; how small the sums were, in the table and on the page."""
    assert simulate() == 0
    out, err = capsys.readouterr()
    assert "warning: secure aggregation is experimental" in err
    assert "warning: without differential privacy" in err
    assert "3 sums of 4 or more updates" in " ".join(out.split())
    page = Path("here/report.html").read_text()
    assert "Secure aggregation is experimental" in page
    assert "Smallest sum" in page


def test_whoever_wants_the_result_alone_gets_it(capsys: pytest.CaptureFixture[str]) -> None:
    """--quiet and --json say nothing on stderr; the document says what the table would."""
    assert simulate("--quiet") == 0
    assert capsys.readouterr().err == ""
    assert coterie("simulate", "tiny.toml", "--site", SITE, "--workers", "1", "--out", "there", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)["secure_aggregation"]
    assert (told["opened"], told["sums"], told["smallest_sum"], told["privacy_set"]) == (3, 3, 4, 3)


def test_masked_and_plain_arms_stand_side_by_side(tmp_path: Path) -> None:
    """In processes of their own: one document on stdout and silence on stderr, whatever these processes do."""
    folds = {"data": {"folds": 2, "clients": 3}, "comparison": {"enabled": True}, "rounds": 2}
    Path("tiny.toml").write_text(tomli_w.dumps(tree(privacy={"secure_aggregation": True}, **folds)))
    words = ["simulate", "tiny.toml", "--site", str(SITE), "--workers", "2", "--out", "here", "--json"]
    with started(words, folder=tmp_path) as process:
        out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    document = json.loads(out)
    assert sorted(document["alone"]) == [f"client-{i:02d}" for i in range(3)]
    assert document["secure_aggregation"]["smallest_sum"] == 3


def test_groups_are_warned_of_with_the_largest_admissible_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Krum against two bad clients needs seven groups."""
    tables = {"strategy": {"name": "krum", "malicious_clients": 2}, "data": {"clients": 21}, "rounds": 1}
    assert simulate(**tables, secagg={"group_size": 3}) == 0
    err = capsys.readouterr().err
    assert "an update hides among those of its group, 3 at most, not among all 21" in err
    assert "too large" not in err


def test_an_interrupted_run_is_resumed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how, and ends with the bytes of a run that nobody interrupted: keys are new, sums are not."""
    assert simulate() == 0
    whole = Path("here/model.safetensors").read_bytes()
    real = Coordinator._judge

    def judge(self: Coordinator, server_round: int) -> Any:
        if server_round == 2:
            monkeypatch.setattr(Coordinator, "_judge", real)
            raise KeyboardInterrupt
        return real(self, server_round)

    monkeypatch.setattr(Coordinator, "_judge", judge)
    words = ["simulate", "tiny.toml", "--site", str(SITE), "--workers", "1", "--out", "again"]
    assert coterie(*words) == 130
    assert "--resume again" in capsys.readouterr().err
    assert coterie("simulate", "--resume", "again", "--site", SITE, "--quiet") == 0
    assert Path("again/model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_on_ray_the_sums_are_the_same(tmp_path: Path) -> None:
    """Flower's runtime on Ray keeps the members' state from message to message; the inline engine's bytes, sealed."""
    changes = {"rounds": 2, "data": {"clients": 3}, "privacy": {"secure_aggregation": True}}
    Path("tiny.toml").write_text(tomli_w.dumps(tree(**changes)))
    words = ["simulate", "tiny.toml", "--site", str(SITE), "--engine", "ray", "--workers", "2", "--sealed"]
    with started([*words, "--out", "ray", "--json"], folder=tmp_path) as process:
        out, err = process.communicate()
        wait_until(lambda: not members(process.pid))
    assert process.returncode == 0, err
    assert json.loads(out)["secure_aggregation"]["smallest_sum"] == 3
    assert coterie("simulate", "tiny.toml", "--site", SITE, "--workers", "1", "--out", "inline", "--quiet") == 0
    assert Path("ray/model.safetensors").read_bytes() == Path("inline/model.safetensors").read_bytes()
