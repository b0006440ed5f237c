"""Updates that were paid for: the same bytes again, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.spool import Release, Spool
from common.errors import LedgerError
from tests.client.conftest import PRIVATE, run, train_message

RELEASE = Release(run="a", server_round=3, base="b")


def test_what_was_stored_comes_back(tmp_path):
    """To the byte; another round, run, model or client gets nothing."""
    spool = Spool(tmp_path, owner="ward-7")
    spool.save(RELEASE, b"update")
    assert spool.load(RELEASE) == b"update"
    others = [
        Release(run="x", server_round=3, base="b"),
        Release(run="a", server_round=2, base="b"),
        Release(run="a", server_round=3, base="x"),
    ]
    assert [spool.load(other) for other in others] == [None, None, None]
    assert Spool(tmp_path, owner="ward-8").load(RELEASE) is None


@given(st.integers(0, 37), st.binary(min_size=1, max_size=3))
def test_what_was_damaged_is_not_there(tmp_path_factory, place, garbage):
    """A power cut can leave anything: it is never sent."""
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, owner="ward-7")
    spool.save(RELEASE, b"update")
    (file,) = (p for p in folder.rglob("*") if p.is_file())
    content = file.read_bytes()
    damaged = content[:place] + garbage + content[place + len(garbage) :]
    file.write_bytes(damaged)
    assert spool.load(RELEASE) == (b"update" if damaged == content else None)
    file.write_bytes(content[:place])
    assert spool.load(RELEASE) is None


def test_rounds_of_a_run_that_are_over_are_forgotten(tmp_path):
    """The present one is not, nor any of another run."""
    spool = Spool(tmp_path, owner="ward-7")
    early, other = (Release(run=run, server_round=2, base="b") for run in ("a", "x"))
    for release in (early, other, RELEASE):
        spool.save(release, b"x")
    spool.drop_before("a", 3)
    assert (spool.load(early), spool.load(other), spool.load(RELEASE)) == (None, b"x", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["3"]


def test_a_disk_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    """And leaves no part behind."""
    (tmp_path / "a").write_text("a file where the run's folder belongs")
    with pytest.raises(LedgerError):
        Spool(tmp_path, owner="ward-7").save(RELEASE, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("setting", "kept"), [("", 1), ("asynchronous.buffer_size=2", 3)])
def test_an_asynchronous_run_keeps_what_others_may_still_be_asked_for(client, setting, kept):
    """Clients of a simulation share the folder: one that answers for a new round does not end an old one of another."""
    config = run(*PRIVATE, *([setting, "asynchronous.max_staleness=2"] if setting else []))
    ward = client(spools=True)
    for server_round in (1, 2, 3, 4):
        assert ward.answer(train_message(config, server_round=server_round)).has_content()
    folders = [path for path in (ward.folder / "spool").glob("*/*") if path.is_dir()]
    assert sorted(int(path.name) for path in folders) == [1, 2, 3, 4][-kept:]
    stored = ward.events
    ward.answer(train_message(config, server_round=5 - kept))
    assert ward.events == stored, "what is stored is sent again, not paid for again"
