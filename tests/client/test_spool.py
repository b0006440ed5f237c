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
    spool.drop_before("a", 3, others=3)
    assert (spool.load(early), spool.load(other), spool.load(RELEASE)) == (None, b"x", b"x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["3"]


def test_others_may_still_need_theirs(tmp_path):
    """Simulated clients share a folder, and asynchronously not all are in the same round: each forgets its own."""
    mine, theirs = Spool(tmp_path, owner="ward-7"), Spool(tmp_path, owner="ward-8")
    first, second = (Release(run="a", server_round=server_round, base="b") for server_round in (1, 2))
    for release in (first, second):
        mine.save(release, b"mine")
        theirs.save(release, b"theirs")
    mine.drop_before("a", 3, others=2)
    assert [mine.load(release) for release in (first, second)] == [None, None]
    assert [theirs.load(release) for release in (first, second)] == [None, b"theirs"]


def test_a_disk_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    """And leaves no part behind."""
    (tmp_path / "a").write_text("a file where the run's folder belongs")
    with pytest.raises(LedgerError):
        Spool(tmp_path, owner="ward-7").save(RELEASE, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("setting", ["", "asynchronous.buffer_size=2"])
def test_a_client_keeps_its_own_last_update_alone(client, setting):
    """However long others of an asynchronous run may be at work: a disk must not fill by a coordinator's setting."""
    config = run(*PRIVATE, *([setting, "asynchronous.max_staleness=2"] if setting else []))
    ward = client(spools=True)
    for server_round in (1, 2, 3, 4):
        assert ward.answer(train_message(config, server_round=server_round)).has_content()
    stored = [path for path in (ward.folder / "spool").rglob("*") if path.is_file()]
    assert [path.parent.name for path in stored] == ["4"]
    events = ward.events
    ward.answer(train_message(config, server_round=4))
    assert ward.events == events, "what is stored is sent again, not paid for again"
