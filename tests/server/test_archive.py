"""A result on its way to an operator: what is in the archive, and what an archive cannot do."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from common.errors import RefusedError, RunError
from server.archive import FILES, pack, unpack
from server.store import RunFolder
from tests.helpers.runs import configuration


def finished(path: Path, **changes: object) -> Path:
    """A small finished run."""
    with RunFolder.create(configuration(**changes), path) as folder:
        folder.append_round(
            {
                "server_round": 1,
                "cohort": ["a", "b"],
                "survivors": ["a"],
                "failures": {"b": "client-lost"},
                "seconds": {},
            }
        )
        folder.write("model.safetensors", b"weights")
        folder.write("report.html", b"<html>b failed</html>")
        folder.write_result({"name": "tiny", "missing": {"client-lost": 1}, "clients": {"a": {}, "b": {}}})
    return path


def packed(path: Path) -> bytes:
    buffer = io.BytesIO()
    pack(path, buffer)
    return buffer.getvalue()


def archive(members: list[tuple[tarfile.TarInfo, bytes]]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for facts, data in members:
            facts.size = len(data)
            file.addfile(facts, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    facts = tarfile.TarInfo(name)
    facts.type = kind
    facts.linkname = "/etc/passwd"
    return facts


def test_a_run_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Byte for byte, as an ordinary run folder."""
    source = finished(tmp_path / "source")
    unpack(io.BytesIO(packed(source)), tmp_path / "target")
    assert {name: (tmp_path / "target" / name).read_bytes() for name in FILES} == {
        name: (source / name).read_bytes() for name in FILES
    }
    assert RunFolder.open(tmp_path / "target").status == "completed"


def test_under_client_level_privacy_nobody_is_named(tmp_path: Path) -> None:
    """Who was asked, who answered and how many did not stay with the coordinator, in every file."""
    privacy = {"unit": "client", "noise_multiplier": 1.0}
    source = finished(tmp_path / "source", privacy=privacy)
    unpack(io.BytesIO(packed(source)), tmp_path / "target")
    target = RunFolder.open(tmp_path / "target")
    (row,) = target.rounds()
    assert (row["cohort"], row["survivors"], row["failures"]) == ([], [], {})
    assert json.loads((target.path / "result.json").read_text())["missing"] == {}
    assert "client-lost" not in (target.path / "report.html").read_text()
    assert "b failed" not in (target.path / "report.html").read_text()
    assert len(RunFolder.open(source).rounds()[0]["cohort"]) == 2, "the run itself stays as it was"


@pytest.mark.parametrize(
    "members",
    [
        [(member("../run.toml"), b"")],
        [(member("/etc/cron.d/x"), b"")],
        [(member("run.toml", tarfile.SYMTYPE), b"")],
        [(member("run.toml", tarfile.LNKTYPE), b"")],
        [(member("run.toml", tarfile.CHRTYPE), b"")],
        [(member("run.toml", tarfile.DIRTYPE), b"")],
        [(member("run.toml"), b""), (member("run.toml"), b"")],
        [(member("run.toml"), b"")],
        [],
    ],
    ids=["above", "absolute", "symlink", "hardlink", "device", "folder", "twice", "incomplete", "empty"],
)
def test_an_archive_holds_a_runs_files_and_nothing_else(tmp_path: Path, members: list) -> None:
    """Whatever else it holds, nothing is written and no folder appears."""
    with pytest.raises(RefusedError):
        unpack(archive(members), tmp_path / "out" / "run")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    """A few hundred bytes that unfold to a full disk."""
    buffer, facts = io.BytesIO(), tarfile.TarInfo("model.safetensors")
    size = 300 << 20
    facts.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(size),
        "GNU.sparse.name": "model.safetensors",
    }
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(facts)
    buffer.seek(0)
    with pytest.raises(RefusedError, match="what no run has"):
        unpack(buffer, tmp_path / "out" / "run")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_archive_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    whole = packed(finished(tmp_path / "source"))
    with pytest.raises(RefusedError):
        unpack(io.BytesIO(whole[:1500]), tmp_path / "out" / "run")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(RunError):
        unpack(io.BytesIO(packed(finished(tmp_path / "source"))), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"
