"""How many lines a ledger has and the last one's hash, kept in another folder: an older ledger put in place of the one
that was written is told by it.

The folder is the one of the site's identity key. Whoever restores a backup of the ledger alone, or cuts its last lines
off, does not reach it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from common.disk import sync
from common.errors import LedgerError, PrivacyError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import START

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Counter:
    """What was last written to a ledger.

    Attributes:
        ledger: The ledger's own name.
        count: Lines.
        head: Hash of the last one; `START` before the first.
        budget: The ceiling that was in force.
    """

    ledger: str
    count: int
    head: str
    budget: Budget


def read_counter(path: Path) -> Counter | None:
    """The counter in a file, or None where there is no file.

    Raises:
        LedgerError: The file is damaged.
        OSError: It cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(data)
        if fields.pop("version") != VERSION or type(fields["count"]) is not int or fields["count"] < 0:
            raise ValueError
        counter = Counter(**fields | {"budget": Budget(**fields["budget"])})
        if (counter.count == 0) != (counter.head == START):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PrivacyError) as e:
        raise LedgerError(f"{path} is damaged", hint="restore it") from e
    return counter


def prepare_counter(path: Path, counter: Counter) -> Path:
    """Write what the counter will be to a temporary file and wait until it is on the disk; that file.

    It is written before the ledger's line, so that a full disk is found while nothing has changed yet.

    Raises:
        OSError: It cannot be written. No temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    data = json.dumps({"version": VERSION, **asdict(counter)}, indent=2).encode() + b"\n"
    try:
        write_whole(temporary, data)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def commit_counter(temporary: Path, path: Path) -> None:
    """Put a prepared counter in place, and wait until that is on the disk.

    Raises:
        OSError: It is not certain to be in place.
    """
    temporary.replace(path)
    sync(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, to the disk.

    Raises:
        OSError: It is not written in full.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
