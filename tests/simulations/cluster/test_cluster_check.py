"""What a node of a cluster is asked first, and what makes it unfit."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.errors import RunError
from simulations.cluster.actor import SharedFolder
from simulations.cluster.check import LOCK, facts_of, look
from simulations.cluster.connection import _files, _why_apart, cluster_at
from tests.helpers.runs import prepared


def test_a_node_with_the_same_facts_is_fit(tmp_path: Path) -> None:
    """Versions, source, data."""
    sites = prepared(tmp_path).sites
    assert facts_of(sites).differences(facts_of(sites)) == ""


@pytest.mark.parametrize(
    ("name", "said"), [("Python", "Python 3.0, not"), ("coterie", "coterie 3.0, not"), ("torch", "torch 3.0, not")]
)
def test_another_version_is_named(tmp_path: Path, name: str, said: str) -> None:
    """Whose, and which."""
    own = facts_of(prepared(tmp_path).sites)
    other = replace(own, versions=tuple((n, "3.0" if n == name else v) for n, v in own.versions))
    assert own.differences(other).startswith(said)


def test_another_source_of_the_same_version_is_noticed(tmp_path: Path) -> None:
    """One that somebody changed on one machine."""
    own = facts_of(prepared(tmp_path).sites)
    assert "another source" in own.differences(replace(own, source="0" * 64))


def test_other_data_are_noticed(tmp_path: Path) -> None:
    """Of another seed, or with one client more; or none at all, with the reason."""
    own = facts_of(prepared(tmp_path).sites)
    for changes in ({"seeds": {"data": 5}}, {"data": {"clients": 5}}):
        assert own.differences(facts_of(prepared(tmp_path, **changes).sites)) == "other data"
    missing = prepared(tmp_path).sites
    lost = facts_of(replace(missing, site_file=tmp_path / "nowhere.toml"))
    assert "the data cannot be loaded" in own.differences(lost)
    assert "nowhere.toml" in own.differences(lost)


def test_a_node_that_shares_the_folder_answers_in_it(tmp_path: Path) -> None:
    """It finds the token that was written for it and leaves its own; nothing stays."""
    sites = prepared(tmp_path).sites
    with _files(tmp_path, {"n1": "one"}) as files:
        token = files["n1"].read_text()
        answer = look(sites, files["n1"])
        assert _why_apart(answer, token, files["n1"]) == ""
    assert not (tmp_path / "nodes").exists()


def test_a_node_with_another_folder_is_told_apart(tmp_path: Path) -> None:
    """It sees nothing, another file, or writes where nobody looks."""
    sites = prepared(tmp_path).sites
    with _files(tmp_path, {"n1": "one"}) as files:
        token = files["n1"].read_text()
        assert "does not see" in _why_apart(look(sites, tmp_path / "elsewhere" / "n1"), token, files["n1"])
        answer = look(sites, files["n1"])
        assert "does not see" in _why_apart(answer, "another", files["n1"])
        files["n1"].write_text("what the node wrote is not here")
        assert "writes what this machine does not see" in _why_apart(answer, token, files["n1"])


def test_locks_that_do_not_reach_a_node_are_noticed(tmp_path: Path) -> None:
    """A ledger that two machines write needs them."""
    sites = prepared(tmp_path).sites
    with _files(tmp_path, {"n1": "one"}) as files:
        token = files["n1"].read_text()
        other = tmp_path / "nodes" / "other"
        other.mkdir()
        (other / LOCK).touch()
        files["n1"].rename(other / "n1")
        answer = look(sites, other / "n1")
        (other / "n1").rename(files["n1"])
        assert "does not see locks" in _why_apart(answer, token, files["n1"])
        (other / LOCK).unlink()
        other.rmdir()


def test_a_process_of_a_node_that_came_later_looks_for_the_folder_itself(tmp_path: Path) -> None:
    """It does not serve where the folder is another one."""
    marker, token = tmp_path / "cluster.token", "abc"
    marker.write_text(token)
    SharedFolder(marker=marker, token=token)()
    for wrong in (SharedFolder(marker=marker, token=token * 2), SharedFolder(marker=tmp_path / "no", token=token)):
        with pytest.raises(RunError, match="not the run's folder"):
            wrong()


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster at"),
        ("head", "expected host:port"),
        ("ray://127.0.0.1:1", "is no Ray cluster's own address"),
    ],
)
def test_a_cluster_that_is_not_there_is_an_error(tmp_path: Path, address: str, said: str) -> None:
    """At once, where Ray would try for minutes."""
    with pytest.raises(RunError, match=said), cluster_at(address, prepared(tmp_path).sites, folder=None, guarded=False):
        raise AssertionError("it connected")
