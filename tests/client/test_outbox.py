"""Updates wait on the disk until their receipt, whole or not at all."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.outbox import Outbox
from common.errors import RunError
from common.transport.sealed import Blob

ONE, TWO = b"1" * 16, b"2" * 16


def add(outbox, message_id=ONE, data=b"ciphertext"):
    return outbox.add(message_id, b"envelope", Blob.of_bytes(data), run_id=b"r" * 16, request_id=b"q" * 16)


def test_what_was_added_is_there_after_a_restart(tmp_path):
    """With all that is needed to send it."""
    added = add(Outbox(tmp_path / "outbox"))
    again = Outbox(tmp_path / "outbox")
    found = again.get(ONE)
    assert found == added
    assert found.path.read_bytes() == b"ciphertext"
    assert (found.envelope, found.run_id, found.request_id, found.size) == (b"envelope", b"r" * 16, b"q" * 16, 10)
    assert list(again) == [ONE]


def test_a_file_is_moved_not_copied(tmp_path):
    """A model of gigabytes is written once."""
    path = tmp_path / "sealed"
    path.write_bytes(b"ciphertext")
    inode = path.stat().st_ino
    outbox = Outbox(tmp_path / "outbox")
    found = outbox.add(ONE, b"e", Blob.of_file(path, 10), run_id=bytes(16), request_id=bytes(16))
    assert found.path.stat().st_ino == inode
    assert not path.exists()


def test_what_was_dropped_is_gone(tmp_path):
    """Also for the next process; dropping twice does nothing."""
    outbox = Outbox(tmp_path / "outbox")
    add(outbox)
    add(outbox, TWO)
    assert outbox.drop(ONE)
    assert not outbox.drop(ONE)
    assert list(outbox) == list(Outbox(tmp_path / "outbox")) == [TWO]
    assert len(list((tmp_path / "outbox").iterdir())) == 1


@pytest.mark.parametrize("missing", ["blob", "envelope", "update.json"])
def test_a_part_of_an_update_is_none(tmp_path, missing):
    """It is removed; the others stay."""
    outbox = Outbox(tmp_path / "outbox")
    add(outbox)
    add(outbox, TWO)
    (tmp_path / "outbox" / ONE.hex() / missing).unlink()
    assert list(Outbox(tmp_path / "outbox")) == [TWO]
    assert not (tmp_path / "outbox" / ONE.hex()).exists()


def test_a_blob_that_was_cut_is_no_update(tmp_path):
    """Its size is not what was stored."""
    add(Outbox(tmp_path / "outbox")).path.write_bytes(b"cipher")
    assert len(Outbox(tmp_path / "outbox")) == 0


def test_a_crash_before_the_end_leaves_nothing(tmp_path, monkeypatch):
    """The folder takes its name last."""
    outbox = Outbox(tmp_path / "outbox")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.rename", crash)
    with pytest.raises(KeyboardInterrupt):
        add(outbox)
    monkeypatch.undo()
    assert len(Outbox(tmp_path / "outbox")) == 0
    assert not list((tmp_path / "outbox").iterdir())


def test_a_full_disk_is_an_error_of_ours_and_leaves_nothing(tmp_path, monkeypatch):
    """And the next update has its place again."""
    outbox = Outbox(tmp_path / "outbox")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("client.outbox.sync", full)
    with pytest.raises(RunError, match="No space"):
        add(outbox)
    monkeypatch.undo()
    assert not list((tmp_path / "outbox").iterdir())
    add(outbox)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_in_its_files_crash_it(tmp_path_factory, data):
    """Whatever a disk brings back."""
    folder = tmp_path_factory.mktemp("outbox")
    add(Outbox(folder))
    (folder / ONE.hex() / "update.json").write_bytes(data)
    (folder / "stray").write_bytes(data)
    assert len(Outbox(folder)) == 0
