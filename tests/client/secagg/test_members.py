"""Where members wait for the next message: in this process, in a client's own state, or in files that are in memory."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context

from client.secagg import ContextMembers, FileJournal, FolderMembers, Members, MemoryMembers, Seat, memory_folder
from common.flower import client_context
from common.secagg import Member, SecAggError
from common.secagg.messages import Advertise
from common.transport.records import decode_records, encode_records
from tests.helpers.secagg import names_of, rules, site

RUN, OTHER = bytes(16), b"\1" * 16
EPOCH = Advertise(epoch=b"e" * 16, rules=rules().digest).to_bytes()


@pytest.fixture
def seat(tmp_path: Path) -> Callable[[], Seat]:
    """The first of four sites."""
    names = names_of(4)
    return lambda: Seat(
        name=names[0],
        signer=site(names[0]),
        peers={name: site(name).record for name in names},
        rules=rules(),
        journal=FileJournal(tmp_path / "journal", RUN, durable=False),
        most_aborts=20,
    )


def context() -> Context:
    return client_context(node_id=2, partition=0)


def asked(members: Members, seat: Callable[[], Seat], where: Context | None = None, *, run_id: bytes = RUN) -> bytes:
    """The member's bundle of one epoch: the same as before if it is the same member, else another."""
    with members.open(run_id, seat, where or context()) as member:
        return member.answer(EPOCH)


class TestMemory:
    def test_keeps_the_member_of_a_run(self, seat: Callable[[], Seat]) -> None:
        """Another run has another one."""
        members = MemoryMembers()
        assert asked(members, seat) == asked(members, seat)
        assert asked(members, seat) != asked(members, seat, run_id=OTHER)

    def test_makes_a_seat_once(self, seat: Callable[[], Seat]) -> None:
        """Reading pins and journal is not needed at every message."""
        made: list[Seat] = []

        def counted() -> Seat:
            made.append(seat())
            return made[-1]

        members = MemoryMembers()
        for _ in range(3):
            asked(members, counted)
        assert len(made) == 1

    def test_forgets_runs_of_long_ago(self, seat: Callable[[], Seat], monkeypatch: pytest.MonkeyPatch) -> None:
        """The last few are kept, and none for longer than a day."""
        members = MemoryMembers(most=2)
        first = asked(members, seat)
        asked(members, seat, run_id=OTHER)
        asked(members, seat, run_id=b"\2" * 16)
        second = asked(members, seat)
        assert second != first
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 86_401)
        asked(members, seat, run_id=OTHER)
        assert asked(members, seat) != second

    def test_counts_what_it_lets_go(self, seat: Callable[[], Seat], monkeypatch: pytest.MonkeyPatch) -> None:
        """Runs enough, and a coordinator could forget orders of sites that it does not like, uncounted."""
        left: list[Member] = []
        monkeypatch.setattr(Member, "leave", lambda member: left.append(member))  # noqa: PLW0108 - to be bound
        members = MemoryMembers(most=2)
        with members.open(RUN, seat, context()) as first:
            pass
        for place in (1, 2):
            assert left == []
            asked(members, seat, run_id=bytes([place]) * 16)
        assert left == [first]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 86_401)
        asked(members, seat)
        assert len(left) == 3, "those of long ago as well"

    def test_shows_no_secret(self, seat: Callable[[], Seat]) -> None:
        """Nor does a seat."""
        members = MemoryMembers()
        asked(members, seat)
        assert repr(members) == "MemoryMembers(1)"
        assert "signer" not in repr(seat())


class TestContext:
    def test_keeps_the_member_in_the_clients_state(self, seat: Callable[[], Seat]) -> None:
        """As it travels to another process, and whatever else lies there."""
        members, first = ContextMembers(), context()
        bundle = asked(members, seat, first)
        state = decode_records(b"".join(encode_records(first.state)))
        there = client_context(node_id=2, partition=0, state=state)
        assert asked(ContextMembers(), seat, there) == bundle
        assert asked(members, seat) != bundle

    def test_keeps_it_after_an_error(self, seat: Callable[[], Seat]) -> None:
        """What it has used up stays so."""
        where = context()
        with suppress(SecAggError), ContextMembers().open(RUN, seat, where) as member:
            bundle = member.answer(EPOCH)
            member.answer(b"nonsense")
        assert asked(ContextMembers(), seat, where) == bundle


class TestFolder:
    def test_keeps_the_member_for_the_next_process(self, seat: Callable[[], Seat], tmp_path: Path) -> None:
        """Under Flower's runtime each message has its own."""
        bundle = asked(FolderMembers(tmp_path), seat)
        assert asked(FolderMembers(tmp_path), seat) == bundle
        assert asked(FolderMembers(tmp_path), seat, run_id=OTHER) != bundle

    def test_keeps_it_after_an_error(self, seat: Callable[[], Seat], tmp_path: Path) -> None:
        """As everywhere."""
        with suppress(SecAggError), FolderMembers(tmp_path).open(RUN, seat, context()) as member:
            bundle = member.answer(EPOCH)
            member.answer(b"nonsense")
        assert asked(FolderMembers(tmp_path), seat) == bundle

    def test_says_no_secret_in_names_and_lets_nobody_read(self, seat: Callable[[], Seat], tmp_path: Path) -> None:
        """A name is the run's, which is public."""
        asked(FolderMembers(tmp_path), seat)
        (file,) = tmp_path.glob("*.member")
        assert file.name == f"{RUN.hex()}.member"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.glob("*.tmp")] == []

    @pytest.mark.parametrize("damage", [b"", b"nonsense", None])
    def test_takes_a_new_member_where_a_file_is_damaged(
        self, seat: Callable[[], Seat], tmp_path: Path, damage: bytes | None
    ) -> None:
        """It joins the next epoch."""
        bundle = asked(FolderMembers(tmp_path), seat)
        (file,) = tmp_path.glob("*.member")
        file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
        assert asked(FolderMembers(tmp_path), seat) != bundle

    def test_removes_what_nobody_asked_for_in_a_day(self, seat: Callable[[], Seat], tmp_path: Path) -> None:
        """Secrets of runs that are over do not wait for anybody; half-written files neither."""
        asked(FolderMembers(tmp_path), seat)
        (file,) = tmp_path.glob("*.member")
        half = tmp_path / "half.tmp"
        half.touch()
        for path in (file, half):
            os.utime(path, (0, 0))
        asked(FolderMembers(tmp_path), seat, run_id=OTHER)
        assert not file.exists()
        assert not half.exists()

    def test_lets_one_process_at_a_time_look_and_act(self, seat: Callable[[], Seat], tmp_path: Path) -> None:
        """Or two would each make a statement about one round, not knowing of the other's."""
        start = get_context("spawn")
        inside, leave, done = start.Event(), start.Event(), start.Event()
        process = start.Process(target=_hold, args=(tmp_path, inside, leave, done))
        process.start()
        assert inside.wait(60)
        leave.set()
        with FolderMembers(tmp_path).open(RUN, seat, context()):
            assert done.is_set()
        process.join()


def _hold(folder: Path, inside: Any, leave: Any, done: Any) -> None:
    """Another process that works with a member, and leaves when it is told."""
    from client.secagg.folder import _alone

    with _alone(folder):
        inside.set()
        leave.wait(60)
        done.set()


class TestAFolderInMemory:
    KEY = b"k" * 32

    def test_is_of_this_user_alone(self, tmp_path: Path) -> None:
        """Named after the kit, so that two never share one."""
        memory = tmp_path / "memory"
        memory.mkdir()
        folder = memory_folder(self.KEY, otherwise=tmp_path / "disk", candidates=[memory])
        assert folder.parent == memory
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert memory_folder(self.KEY, otherwise=tmp_path / "disk", candidates=[memory]) == folder
        assert memory_folder(b"l" * 32, otherwise=tmp_path / "disk", candidates=[memory]) != folder
        assert not (tmp_path / "disk").exists()

    def test_is_on_the_disk_where_there_is_none(self, tmp_path: Path) -> None:
        """In the kit's own state."""
        folder = memory_folder(self.KEY, otherwise=tmp_path / "disk", candidates=[tmp_path / "none"])
        assert folder == tmp_path / "disk"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    @pytest.mark.parametrize("trap", ["link", "file", "open to all"])
    def test_is_never_one_that_somebody_else_may_have_made(self, tmp_path: Path, trap: str) -> None:
        """Shared memory is everybody's: a folder that is there already can be a trap."""
        memory, aim = tmp_path / "memory", tmp_path / "aim"
        memory.mkdir()
        aim.mkdir()
        name = memory_folder(self.KEY, otherwise=tmp_path / "disk", candidates=[memory])
        name.rmdir()
        if trap == "link":
            name.symlink_to(aim)
        elif trap == "file":
            name.touch()
        else:
            name.mkdir()
            name.chmod(0o777)
        assert memory_folder(self.KEY, otherwise=tmp_path / "disk", candidates=[memory]) == tmp_path / "disk"

    def test_is_of_the_users_session_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is a session."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert memory_folder(self.KEY, otherwise=tmp_path / "disk").parent == tmp_path
