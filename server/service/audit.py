"""The service's audit log: who came, what was asked of whom, what came back, which model was released.

Lines of JSON, each bound to the one before by its hash: no line changes, moves or goes without a trace. How many there
are and the hash of the last are kept in the service's database too, so that a log that was cut short is noticed. Who
can write both files can also write another history; who keeps a copy of a head elsewhere notices that as well.

Every line is handed to the operating system at once. It is waited for (fsync) at the end of a round and after whatever
concerns who may do what; between those, a power cut can cost the last lines, and the head then says less, not more.
Digests, sizes and names only: no weights, no keys, no losses of a site. Still the file is the coordinator's alone: over
Poisson cohorts the names in it are as secret as the updates.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from common.disk import disk_errors, sync
from server.service.state import now

START: Final = "0" * 64
"""What the first line names as its predecessor."""
AUDIT: Final = "audit.jsonl"
SECURED: Final = frozenset(
    {
        "service-started", "service-stopped", "audit-damaged", "site-attached", "site-detached", "denied", "enrolled",
        "renewed", "run-submitted", "run-started", "run-stopped", "run-ended", "round-ended", "result-downloaded",
    }
)  # fmt: skip
"""Events that are on the disk soon after they are recorded, whatever becomes of the machine."""

log = structlog.get_logger()

Line = dict[str, Any]
Watcher = Callable[[Line], None]


class Heads(Protocol):
    """Where the log's head is kept: `ServiceState`."""

    def audit_head(self) -> tuple[int, str] | None:
        """How many lines there were, and the hash of the last."""
        ...

    def set_audit_head(self, lines: int, digest: str) -> None:
        """Keep that."""
        ...

    def audit_damage(self) -> list[str]:
        """What was found wrong before."""
        ...

    def add_audit_damage(self, problem: str) -> None:
        """Keep that for ever: the lines that follow would hide it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a reading of a log found.

    Attributes:
        lines: Sound lines from the start.
        head: Hash of the last of them.
        problem: What is wrong with the next line, or with the whole; empty if nothing is.
        tail: Bytes after the last newline: a line that was never finished.
    """

    lines: int
    head: str
    problem: str = ""
    tail: int = 0


def verify(path: Path, heads: Heads) -> Verdict:
    """Read a log from its first line to its last; also while it is being written.

    Raises:
        RunError: A file cannot be read.
    """
    head = heads.audit_head()  # first: the log only grows
    damage = heads.audit_damage()
    verdict, seen = _read(path, () if head is None else (head[0],))
    if verdict.problem:
        return verdict
    if head is not None and head[0] > verdict.lines:
        problem = f"line {verdict.lines + 1}: lines are missing: there were {head[0]}"
    elif head is not None and head[0] and seen.get(head[0]) != head[1]:
        problem = f"line {head[0]}: it is not the line that was written: its hash differs from the one kept"
    else:
        problem = damage[0] if damage else ""
    return Verdict(lines=verdict.lines, head=verdict.head, problem=problem, tail=verdict.tail)


def read_lines(path: Path, *, wanted: Callable[[Line], bool] = lambda _: True) -> Iterator[Line]:
    """The finished lines of a log that can be read, oldest first; whether they are sound is not looked at.

    Raises:
        RunError: The file cannot be read.
    """
    for raw in _raw_lines(path):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and wanted(line):
            yield line


class AuditLog:
    """Appends to a log; thread-safe. One process writes it.

    Guarantee: lines are in the order of the calls; a line that `record` returned for is in the file, and on the disk
    after the next `secure`. A log that is found damaged at the start is not mended: that is recorded in it and beside
    it, and it goes on.

    Raises:
        RunError: The file cannot be read or written.
    """

    def __init__(self, path: Path, heads: Heads) -> None:
        self.path = path
        self._heads = heads
        self._mutex = threading.RLock()
        self._securing = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._watchers: list[Watcher] = []
        verdict = verify(path, heads)
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            sync(path.parent)
            self._size = os.fstat(self._file).st_size
            if verdict.tail:
                self._size -= verdict.tail  # nobody was told of a line that was never finished
                os.ftruncate(self._file, self._size)
        self._lines, self._head = verdict.lines, verdict.head
        if verdict.problem:
            self._end_line()
            self._lines, self._head = _last(path)
            if verdict.problem not in heads.audit_damage():
                heads.add_audit_damage(verdict.problem)
                log.error("audit_log_damaged", path=str(path), problem=verdict.problem)
                self.record("audit-damaged", problem=verdict.problem)
        self._secured = -1
        self.secure()
        self._thread = threading.Thread(target=self._keep_secure, name="audit", daemon=True)
        self._thread.start()

    def _end_line(self) -> None:
        """Keep what follows apart from a last line that a damaged log was left with."""
        with disk_errors(self.path):
            if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
                self._size += os.write(self._file, b"\n")

    def record(self, event: str, **facts: Any) -> Line:
        """Add a line: what happened, and facts that are JSON values. Those that are None or empty are left out.

        Raises:
            RunError: The disk is full or the file cannot be written; then nothing was added.
        """
        told = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
        with self._mutex:
            line = {**told, "event": event, "at": now(), "number": self._lines, "previous": self._head}
            data = json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
            with disk_errors(self.path):
                try:
                    if os.write(self._file, data + b"\n") != len(data) + 1:
                        raise OSError(28, "No space left on device")
                except OSError:
                    os.ftruncate(self._file, self._size)
                    raise
            self._size += len(data) + 1
            self._lines, self._head = self._lines + 1, hashlib.sha256(data).hexdigest()
            watchers = list(self._watchers)
        if event in SECURED:
            self._wake.set()
        for watch in watchers:
            watch(line)
        return line

    def secure(self) -> None:
        """Wait until every line so far is on the disk, and its head beside it.

        Raises:
            RunError: The disk failed.
        """
        with self._securing:
            with self._mutex:
                lines, head = self._lines, self._head
            if lines == self._secured:
                return
            with disk_errors(self.path):
                os.fsync(self._file)
            self._heads.set_audit_head(lines, head)
            self._secured = lines

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Have somebody told of every line from now on; returns what ends it. A watcher must be quick and not fail."""
        with self._mutex:
            self._watchers.append(watcher)

        def end() -> None:
            with self._mutex:
                self._watchers.remove(watcher)

        return end

    def close(self) -> None:
        """Secure what is there and let go of the file."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        self._wake.set()
        self._thread.join()
        self.secure()
        os.close(self._file)

    def _keep_secure(self) -> None:
        """Secure lines that asked for it without making whoever recorded them wait for the disk."""
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            try:
                self.secure()
            except Exception:  # the next round's end tries again, and there it counts
                log.exception("audit_log_not_secured", path=str(self.path))


def _read(path: Path, noted: tuple[int, ...]) -> tuple[Verdict, dict[int, str]]:
    """Follow the chain; also the hashes of lines number `noted` (counting from 1)."""
    lines, head, tail = 0, START, 0
    seen: dict[int, str] = {}
    with disk_errors(path, "read"):
        if not path.exists():
            return Verdict(lines=0, head=START), seen
        with path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    tail = len(raw)
                    break
                problem = _fault(raw[:-1], lines, head)
                if problem:
                    return Verdict(lines=lines, head=head, problem=f"line {lines + 1}: {problem}"), seen
                lines, head = lines + 1, hashlib.sha256(raw[:-1]).hexdigest()
                if lines in noted:
                    seen[lines] = head
    return Verdict(lines=lines, head=head, tail=tail), seen


def _fault(raw: bytes, number: int, previous: str) -> str:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return "it cannot be read"
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return "it is no record"
    if line.get("number") != number or line.get("previous") != previous:
        return "it does not follow the line before it"
    return ""


def _last(path: Path) -> tuple[int, str]:
    """How many lines a damaged log has, and the hash of the last: what the next line follows."""
    lines, head = 0, START
    for raw in _raw_lines(path):
        lines, head = lines + 1, hashlib.sha256(raw).hexdigest()
    return lines, head


def _raw_lines(path: Path) -> Iterator[bytes]:
    with disk_errors(path, "read"):
        if not path.exists():
            return
        with path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):
                    yield raw[:-1]
