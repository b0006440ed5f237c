"""What a site has masked and signed outlasts its processes, however they end."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.secagg import FileJournal
from common.errors import RunError
from common.secagg import Use

RUN = bytes(range(16))
FILE = f"{RUN.hex()}.jsonl"


def use(number: int, *, base: int = 0, epoch: int = 0, index: int = 1) -> Use:
    """A round that begins."""
    return Use(
        header=bytes([number]) * 32,
        base=bytes([base]) * 32,
        participants=("east", "north"),
        epoch=bytes([epoch]) * 16,
        index=index,
    )


def again(folder: Path, **how: object) -> FileJournal:
    """The journal as the next process finds it."""
    return FileJournal(folder, RUN, **how)  # type: ignore[arg-type]


class TestEntries:
    def test_are_found_by_every_later_process(self, tmp_path: Path) -> None:
        """Uses by their model and by their round, statements by their round."""
        first, second = use(1, base=7), use(2, base=7, index=2)
        journal = again(tmp_path)
        journal.use(first)
        journal.use(second)
        journal.state(first.header, b"burnt")
        for found in (journal, again(tmp_path)):
            assert list(found.uses(first.base)) == [first, second]
            assert found.find(second.header) == second
            assert found.stated(first.header) == b"burnt"
            assert found.stated(second.header) is None
            assert list(found.uses(bytes(32))) == []
            assert found.find(bytes(32)) is None

    def test_know_the_highest_index_of_each_epoch(self, tmp_path: Path) -> None:
        """Whatever the order; 0 where there is none."""
        journal = again(tmp_path)
        for number, index in enumerate((3, 5, 4), start=1):
            journal.use(use(number, epoch=1, index=index))
        journal.use(use(9, epoch=2, index=1))
        found = again(tmp_path)
        assert [found.last_index(bytes([epoch]) * 16) for epoch in (1, 2, 3)] == [5, 1, 0]

    def test_are_of_one_run(self, tmp_path: Path) -> None:
        """Two runs may start from one model."""
        again(tmp_path).use(use(1))
        assert list(FileJournal(tmp_path, bytes(16)).uses(use(1).base)) == []

    def test_say_one_thing_about_a_round(self, tmp_path: Path) -> None:
        """Also to a process that did not hear it said."""
        journal = again(tmp_path)
        journal.state(bytes(32), b"burnt")
        with pytest.raises(RunError, match="something else"):
            journal.state(bytes(32), b"survivors")
        journal.state(bytes(32), b"burnt")
        with pytest.raises(RunError, match="something else"):
            again(tmp_path).state(bytes(32), b"survivors")
        assert (tmp_path / FILE).read_bytes().count(b"\n") == 1

    def test_are_for_this_user_only(self, tmp_path: Path) -> None:
        """Who takes part in what is nobody else's business."""
        folder = tmp_path / "state"
        again(folder).use(use(1))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600


class TestAKilledProcess:
    @settings(deadline=None)
    @given(left=st.integers(min_value=0, max_value=300), tail=st.binary(max_size=8))
    def test_leaves_what_was_written_whole(self, left: int, tail: bytes) -> None:
        """Wherever the last line was cut off, and whatever a power cut filled it up with."""
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            journal = again(folder)
            journal.use(use(1))
            journal.use(use(2, index=2))
            before = (folder / FILE).read_bytes()
            last = before.rindex(b"\n", 0, -1) + 1
            torn = before[: min(last + left, len(before) - 1)] + tail.replace(b"\n", b"\0")
            (folder / FILE).write_bytes(torn)
            found = again(folder)
            assert list(found.uses(use(1).base)) == [use(1)]
            found.use(use(3, index=3))
            assert list(again(folder).uses(use(1).base)) == [use(1), use(3, index=3)]

    def test_has_not_said_what_it_could_not_write(self, tmp_path: Path) -> None:
        """A full disk is an error before anything is signed or masked."""
        journal = again(tmp_path / "there" / "is" / "none")
        (tmp_path / "there").write_text("in the way")
        with pytest.raises(RunError, match="cannot be written"):
            journal.state(bytes(32), b"burnt")
        assert journal.stated(bytes(32)) is None
        with pytest.raises(RunError, match="cannot be written"):
            journal.use(use(1))
        assert journal.find(use(1).header) is None

    def test_has_waited_for_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before a call returns, file and folder are on it; in simulations it need not be."""
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
        again(tmp_path / "state").use(use(1))
        assert (tmp_path / "state" / FILE).stat().st_ino in synced
        assert (tmp_path / "state").stat().st_ino in synced
        synced.clear()
        again(tmp_path / "simulated", durable=False).use(use(1))
        assert synced == []


class TestDamage:
    @pytest.mark.parametrize(
        "line", [b"", b"{", b"[]", b"{}", b"null", b'{"kind":"used"}', b'{"kind":"else","header":"00"}', b"\xff"]
    )
    def test_in_a_whole_line_is_an_error(self, tmp_path: Path, line: bytes) -> None:
        """A journal with a gap would allow what it forbids."""
        again(tmp_path).use(use(1))
        with (tmp_path / FILE).open("ab") as file:
            file.write(line + b"\n")
        with pytest.raises(RunError, match="damaged"):
            again(tmp_path)


class TestAborts:
    def test_count_for_a_day_and_over_all_runs(self, tmp_path: Path) -> None:
        """By the site's own clock; one that was set back forgets nothing."""
        now = datetime(2026, 1, 1, 12, tzinfo=UTC)
        journal = again(tmp_path, now=lambda: now)
        journal.aborted()
        journal.aborted()
        for hours, count in ((1, 2), (23, 2), (25, 0), (-5, 2)):
            moment = now + timedelta(hours=hours)
            later = FileJournal(tmp_path, bytes(16), now=lambda moment=moment: moment)
            assert later.aborts_today() == count

    def test_do_not_touch_the_runs_journal(self, tmp_path: Path) -> None:
        """They lie in a file of their own, which may be damaged without a run's end."""
        again(tmp_path).aborted()
        (tmp_path / "aborts.jsonl").write_text("x\n")
        journal = again(tmp_path)
        journal.use(use(1))
        with pytest.raises(RunError, match="damaged"):
            journal.aborts_today()
