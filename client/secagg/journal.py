"""Which models a site has trained on under secure aggregation, and what it has signed about each round: on disk first.

A member's secrets may be lost with its process, this may not: a second masked update over one model, or a second
statement about one round, is what gives a single update away. One JSON line an entry, only ever appended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from common.disk import disk_errors, sync
from common.errors import RunError
from common.secagg.parties import Use

_USED, _STATED, _ABORTED = "used", "stated", "aborted"
_ABORTS: Final = "aborts.jsonl"
"""One file for all runs: whoever orders many runs gets no more set-ups that fail."""
_DAY_SECONDS: Final = 86_400.0


class FileJournal:
    """The journal of one run, in a folder of the site's state.

    Guarantee:
        What `use`, `state` and `aborted` were told is on the disk when they return, and is found again by every later
        process. A last line that a killed process left unfinished was never acted upon: it is dropped. Any other
        damage is an error; a journal with a gap would allow what it forbids.
    """

    def __init__(
        self, folder: Path, run_id: bytes, *, durable: bool = True, now: Callable[[], datetime] | None = None
    ) -> None:
        """Open, or begin when the first entry comes.

        Args:
            folder: Holds the journals of all runs; made when it is needed, for this user only.
            run_id: Whose journal this is.
            durable: Whether to wait until an entry outlasts a power cut. A simulation need not.
            now: Tells the time, with its zone.
        """
        self._path, self._aborts = folder / f"{run_id.hex()}.jsonl", folder / _ABORTS
        self._durable = durable
        self._now = now or (lambda: datetime.now(UTC))
        self._uses: dict[bytes, list[Use]] = {}
        self._headers: dict[bytes, Use] = {}
        self._indices: dict[bytes, int] = {}
        self._statements: dict[bytes, bytes] = {}
        with _damage(self._path):
            for entry in _entries(self._path):
                self._take(entry)

    def uses(self, base: bytes) -> Sequence[Use]:
        """Every use of a model, the earliest first."""
        return tuple(self._uses.get(base, ()))

    def use(self, use: Use) -> None:
        """Write down that this model is being trained on, before it is.

        Raises:
            RunError: That cannot be written.
        """
        entry = {
            "kind": _USED,
            "header": use.header.hex(),
            "base": use.base.hex(),
            "epoch": use.epoch.hex(),
            "index": use.index,
            "names": list(use.participants),
        }
        self._append(self._path, entry)
        self._take(entry)

    def last_index(self, epoch: bytes) -> int:
        """The highest index used in an epoch; 0 if there is none."""
        return self._indices.get(epoch, 0)

    def find(self, header: bytes) -> Use | None:
        """The use in the round of this header."""
        return self._headers.get(header)

    def stated(self, header: bytes) -> bytes | None:
        """What was signed about a round."""
        return self._statements.get(header)

    def state(self, header: bytes, statement: bytes) -> None:
        """Write down what is about to be signed.

        Raises:
            RunError: That cannot be written, or something else was stated about this round.
        """
        before = self._statements.get(header)
        if before is not None and before != statement:
            raise RunError("something else was stated about this round", hint="one statement a round is ever signed")
        if before is None:
            entry = {"kind": _STATED, "header": header.hex(), "statement": statement.hex()}
            self._append(self._path, entry)
            self._take(entry)

    def aborted(self) -> None:
        """Write down that a set-up has failed, now.

        Raises:
            RunError: That cannot be written.
        """
        self._append(self._aborts, {"kind": _ABORTED, "at": self._now().isoformat()})

    def aborts_today(self) -> int:
        """How many set-ups of all runs have failed in the last 24 hours."""
        now = self._now()
        with _damage(self._aborts):
            times = [datetime.fromisoformat(entry["at"]) for entry in _entries(self._aborts)]
            return sum(abs((now - at).total_seconds()) < _DAY_SECONDS for at in times)

    def _take(self, entry: dict[str, Any]) -> None:
        header = bytes.fromhex(entry["header"])
        if entry["kind"] == _USED:
            use = Use(
                header=header,
                base=bytes.fromhex(entry["base"]),
                participants=tuple(entry["names"]),
                epoch=bytes.fromhex(entry["epoch"]),
                index=int(entry["index"]),
            )
            self._uses.setdefault(use.base, []).append(use)
            self._headers[header] = use
            self._indices[use.epoch] = max(use.index, self.last_index(use.epoch))
        elif entry["kind"] == _STATED:
            self._statements[header] = bytes.fromhex(entry["statement"])
        else:
            raise ValueError(entry["kind"])

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        with disk_errors(path):
            new = not path.exists()
            if new:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                _end_at_a_line(file)
                file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
            if new and self._durable:
                sync(path.parent)
                sync(path.parent.parent)


def _entries(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _end_at_a_line(file: BinaryIO) -> None:
    """Cut off what a killed process left unfinished: it must not become the beginning of the next entry."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn whatever a damaged line gives into one error that names the file.

    Raises:
        RunError: A whole line is no entry, or the file cannot be read.
    """
    with disk_errors(path, "read"):
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise RunError(
                f"{path} is damaged", hint="restore it from a copy; without it the site stays out of this run"
            ) from e
