"""The audit log: what it promises to who reads it, and what it notices."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import RunError
from server.service import audit
from server.service.audit import AuditLog, read_lines, verify
from server.service.state import ServiceState

LINES = 6


class Logged:
    """A log of `LINES` lines that was closed, and its database."""

    def __init__(self, folder: Path) -> None:
        self.path, self.database = folder / "audit.jsonl", folder / "service.db"
        with self.opened() as log:
            for number in range(LINES):
                log.record("asked", site=f"site-{number}", bytes=number)

    def opened(self) -> _Opened:
        return _Opened(self.path, self.database)

    def problem(self) -> str:
        state = ServiceState(self.database, reading=True)
        try:
            return verify(self.path, state).problem
        finally:
            state.close()


class _Opened:
    def __init__(self, path: Path, database: Path) -> None:
        self._path, self._database = path, database

    def __enter__(self) -> AuditLog:
        self._state = ServiceState(self._database)
        self._log = AuditLog(self._path, self._state)
        return self._log

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._state.close()


@pytest.fixture
def logged(tmp_path: Path) -> Logged:
    return Logged(tmp_path)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """One log for many examples, each of which restores it."""
    return Logged(tmp_path_factory.mktemp("audit"))


class TestVerifying:
    def test_a_log_that_nobody_touched_is_sound(self, logged: Logged) -> None:
        """Also after it was opened and continued by another process."""
        with logged.opened() as log:
            log.record("asked", site="later")
        assert logged.problem() == ""
        numbers = [line["number"] for line in read_lines(logged.path)]
        assert numbers == list(range(LINES + 1))

    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.integers(0), value=st.integers(1, 255))
    def test_any_changed_byte_is_found_at_its_line(self, one: Logged, place: int, value: int) -> None:
        """Whatever the byte becomes: that line or the next does not fit, and nothing before it is accused."""
        data = one.path.read_bytes()
        place %= len(data)
        changed = bytearray(data)
        changed[place] ^= value
        line = data[:place].count(b"\n") + 1
        one.path.write_bytes(bytes(changed))
        try:
            problem = one.problem()
        finally:
            one.path.write_bytes(data)
        found = int(problem.removeprefix("line ").partition(":")[0])
        assert found in {line, line + 1}

    @pytest.mark.parametrize("gone", range(LINES))
    def test_a_missing_line_is_found(self, logged: Logged, gone: int) -> None:
        """In the middle by the chain, at the end by the head that is kept elsewhere."""
        lines = logged.path.read_bytes().splitlines(keepends=True)
        logged.path.write_bytes(b"".join(line for i, line in enumerate(lines) if i != gone))
        assert logged.problem().startswith(f"line {gone + 1}: ")

    def test_a_history_written_anew_is_found(self, logged: Logged, tmp_path: Path) -> None:
        """As long and as well chained as the true one, but not the one whose head was kept."""
        (tmp_path / "other").mkdir()
        other = Logged(tmp_path / "other")
        logged.path.write_bytes(other.path.read_bytes().replace(b"site-0", b"site-9"))
        assert logged.problem().startswith("line 2: ")
        logged.path.write_bytes(other.path.read_bytes())
        assert "its hash differs" in logged.problem()

    def test_a_log_that_is_gone_is_found(self, logged: Logged) -> None:
        logged.path.unlink()
        assert logged.problem() == f"line 1: lines are missing: there were {LINES}"


class TestGoingOn:
    def test_after_a_line_that_was_never_finished(self, logged: Logged) -> None:
        """A process that was killed while it wrote is no damage: nobody was told of that line."""
        with logged.path.open("ab") as file:
            file.write(b'{"event": "ask')
        assert logged.problem() == ""
        with logged.opened() as log:
            assert log.record("asked")["number"] == LINES
        assert logged.problem() == ""

    def test_after_damage_without_hiding_it(self, logged: Logged) -> None:
        """The log is not mended: a line says what was found, and verifying goes on saying it."""
        lines = logged.path.read_bytes().splitlines(keepends=True)
        logged.path.write_bytes(b"".join(lines[:-2]))
        for _ in range(2):
            with logged.opened() as log:
                log.record("asked", site="later")
        assert "lines are missing" in logged.problem()
        assert len([line for line in read_lines(logged.path) if line["event"] == "audit-damaged"]) == 1

    def test_after_a_full_disk_nothing_half_is_left(self, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
        """A line that did not fit is taken back, and the next one follows the line before it."""
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            write(descriptor, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with logged.opened() as log:
            monkeypatch.setattr(audit.os, "write", full)
            with pytest.raises(RunError, match="cannot be written"):
                log.record("asked")
            monkeypatch.undo()
            log.record("asked", site="next")
        assert logged.problem() == ""
        assert list(read_lines(logged.path))[-1]["site"] == "next"


class TestWriting:
    def test_by_several_threads_makes_one_chain(self, logged: Logged) -> None:
        with logged.opened() as log:
            threads = [
                threading.Thread(target=lambda i=i: [log.record("asked", site=f"s{i}", round=r) for r in range(25)])
                for i in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert logged.problem() == ""
        assert len(list(read_lines(logged.path))) == LINES + 100

    def test_watchers_see_every_line_until_they_leave(self, logged: Logged) -> None:
        """In the order in which they stand in the file."""
        seen: list[int] = []
        with logged.opened() as log:
            leave = log.watch(lambda line: seen.append(line["number"]))
            log.record("asked")
            log.record("received")
            leave()
            log.record("asked")
        assert seen == [LINES, LINES + 1]

    def test_secured_lines_are_counted_elsewhere(self, logged: Logged) -> None:
        """From then on they cannot be cut off unnoticed."""
        with logged.opened() as log:
            log.record("round-ended", round=1)
            log.secure()
            state = ServiceState(logged.database, reading=True)
            assert (state.audit_head() or (0, ""))[0] == LINES + 1
            state.close()
