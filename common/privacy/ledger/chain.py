"""Records as lines, each bound to the one before by its hash: no line changes, moves or goes without a trace.

A line is one JSON object: its `number` from 0, the hash of the line `previous` to it, and the record's own fields. The
hash of a line covers all of its bytes, so the last line's hash stands for the whole file. Who can write the file can
also write another chain; whether this is the one that was written is told by a counter kept elsewhere (`counter`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import LedgerError

START = "0" * 64
"""What the first line names as its predecessor."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chain:
    """What could be read of a file.

    Attributes:
        records: Records of the sound lines, up to the first that is not.
        size: Bytes that they take.
        head: Hash of the last of them; `START` where there is none.
        tail: Bytes after the last newline: a line that was never finished.
        problem: Why reading stopped before the end, or empty.
    """

    records: tuple[Record, ...] = ()
    size: int = 0
    head: str = START
    tail: bytes = b""
    problem: str = ""

    @property
    def before(self) -> str:
        """Hash of the last line but one."""
        previous: str = self.records[-1]["previous"] if self.records else ""
        return previous


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def line_after(chain: Chain, record: Record) -> bytes:
    """The line that continues a chain with one more record."""
    return linked_line(record, number=len(chain.records), previous=chain.head)


def linked_line(record: Record, *, number: int, previous: str) -> bytes:
    """A record as the line of that number, after a line of that hash."""
    return _ENCODER.encode({**record, "number": number, "previous": previous}).encode() + b"\n"


def linked_record(line: bytes, *, number: int, previous: str) -> Record:
    """The record of a line (without its newline).

    Raises:
        LedgerError: It is not the line of that number, after a line of that hash.
    """
    record = _parse(line)
    if record.get("number") != number or record.get("previous") != previous:
        raise LedgerError("does not follow the line before it")
    return record


def line_hash(line: bytes) -> str:
    """What the next line names as its predecessor; the line is without its newline."""
    return hashlib.sha256(line).hexdigest()


def read_chain(data: bytes, after: Chain | None = None, take: Callable[[Record], None] = lambda _: None) -> Chain:
    """Read lines up to the first that does not continue the chain.

    Args:
        data: A file's bytes; those that follow `after`.
        after: What was read before, without a problem.
        take: Told of every record; a LedgerError of it ends the reading before that record.

    Guarantee: No bytes raise an error: what is wrong is told in `problem`.
    """
    chain = after or Chain()
    records, size, head = list(chain.records), chain.size, chain.head
    *lines, tail = data.split(b"\n")
    for line in lines:
        try:
            record = linked_record(line, number=len(records), previous=head)
            take(record)
        except LedgerError as e:
            return Chain(tuple(records), size, head, problem=f"line {len(records) + 1}: {e}")
        records.append(record)
        size, head = size + len(line) + 1, line_hash(line)
    return Chain(tuple(records), size, head, tail)


def _parse(line: bytes) -> Record:
    """A line's record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise LedgerError("cannot be read") from e
    if not isinstance(record, dict):
        raise LedgerError("is no record")
    return record
