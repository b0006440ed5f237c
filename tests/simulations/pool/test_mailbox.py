"""Arrays go between a pool and its workers through files in memory, which are written once and used again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, RecordDict

from common.errors import RunError
from common.flower import ARRAYS, arrays_of, prepare_process, to_record
from common.transport.records import encode_records
from simulations.pool.mailbox import SMALL_BYTES, Mailbox, Writer

VALUES = np.arange(SMALL_BYTES, dtype=np.float32)


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    prepare_process()
    made = Mailbox()
    yield made
    made.close()


def model(value: float) -> dict[str, ArrayRecord]:
    return {ARRAYS: to_record({"w": np.full(3, value)})}


def sent(mailbox: Mailbox, slot: Path, values: np.ndarray, writer: Writer | None = None) -> RecordDict:
    """What the pool reads of a reply that a worker writes."""
    size = (writer or Writer()).write(str(slot), encode_records(RecordDict({ARRAYS: to_record({"w": values})})))
    assert size is not None
    return mailbox.read(slot, size)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestPublished:
    def test_is_written_once_for_the_same_arrays(self, mailbox: Mailbox) -> None:
        """Every client of a round is sent the same ones; the next round's are others."""
        first = model(1.0)
        assert mailbox.publish(first) == mailbox.publish(dict(first))
        assert mailbox.publish(model(1.0)) != mailbox.publish(first)

    def test_is_read_as_it_was_written(self, mailbox: Mailbox) -> None:
        """By a worker that keeps it mapped until there is another."""
        writer = Writer()
        for value in (1.0, 2.0):
            path = str(mailbox.publish(model(value)))
            assert writer.published(path) is writer.published(path)
            assert arrays_of(writer.published(path))["w"].tolist() == [value] * 3

    def test_stays_while_a_worker_may_need_it(self, mailbox: Mailbox) -> None:
        """The current one always does."""
        old, current = mailbox.publish(model(1.0)), mailbox.publish(model(2.0))
        mailbox.keep({old})
        assert old.exists()
        mailbox.keep(set())
        assert not old.exists()
        assert current.exists()

    def test_goes_to_the_disk_where_memory_has_no_room(self, mailbox: Mailbox) -> None:
        """A container's files in memory can be limited to 64 MB."""
        mailbox.folders[0].rmdir()
        path = mailbox.publish(model(1.0))
        assert path.parent == mailbox.folders[-1]
        assert arrays_of(Writer().published(str(path)))["w"].tolist() == [1.0] * 3

    def test_without_room_anywhere_is_an_error(self, mailbox: Mailbox) -> None:
        """It says what could not be written."""
        for folder in mailbox.folders:
            folder.rmdir()
        with pytest.raises(RunError, match="records cannot be written"):
            mailbox.publish(model(1.0))


class TestReply:
    def test_arrives_to_the_bit(self, mailbox: Mailbox) -> None:
        """Nobody can write into it."""
        arrays = arrays_of(sent(mailbox, mailbox.slot(), VALUES))
        assert arrays["w"].tobytes() == VALUES.tobytes()
        assert not arrays["w"].flags.writeable

    def test_that_is_small_takes_no_file(self, mailbox: Mailbox) -> None:
        """A pipe is quicker."""
        slot = mailbox.slot()
        assert Writer().write(str(slot), [b"x" * SMALL_BYTES]) is None
        assert not slot.exists()

    def test_leaves_its_file_to_another_when_it_is_gone(self, mailbox: Mailbox) -> None:
        """Not before: whoever adds up replies may keep one until its turn has come."""
        writer = Writer()
        slot = mailbox.slot()
        kept = arrays_of(sent(mailbox, slot, VALUES, writer))["w"]
        other = mailbox.slot()
        assert other != slot
        mailbox.take_back(other)
        assert sent(mailbox, mailbox.slot(), VALUES + 1, writer) is not None
        assert np.array_equal(kept, VALUES)
        del kept
        assert slot in {mailbox.slot(), mailbox.slot()}

    def test_may_be_larger_than_the_last_one(self, mailbox: Mailbox) -> None:
        """Or smaller; a file is as large as the largest."""
        slot, writer = mailbox.slot(), Writer()
        for values in (VALUES, np.tile(VALUES, 3), VALUES[: len(VALUES) // 2]):
            assert np.array_equal(arrays_of(sent(mailbox, slot, values, writer))["w"], values)

    def test_without_room_for_a_file_goes_another_way(self, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pages are reserved before they are written: a page that is missing then would end the worker."""
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert Writer().write(str(mailbox.slot()), [VALUES.tobytes()]) is None


def test_nothing_is_left(mailbox: Mailbox) -> None:
    """Closing it removes all files."""
    mailbox.publish(model(1.0))
    reply = sent(mailbox, mailbox.slot(), VALUES)
    mailbox.close()
    assert not any(folder.exists() for folder in mailbox.folders)
    assert np.array_equal(arrays_of(reply)["w"], VALUES)
