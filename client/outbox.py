"""Sealed updates that wait for the coordinator's receipt, on the disk before the first byte is sent.

    outbox/<message id>/blob, envelope, update.json

A folder appears whole or not at all. What is in it is ciphertext for the coordinator; only sizes and ids are in clear.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from common.disk import disk_errors, sync
from common.transport.sealed import Blob

log = structlog.get_logger()

_ID = re.compile(r"[0-9a-f]{32}")
_BLOB, _ENVELOPE, _FACTS = "blob", "envelope", "update.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A sealed update on the disk.

    Attributes:
        message_id: The order that it answers.
        run_id: The order's run.
        request_id: Message id of what was sealed for this order, and perhaps for other sites.
        envelope: For the coordinator.
        path: The ciphertext.
        size: Its bytes.
    """

    message_id: bytes
    run_id: bytes
    request_id: bytes
    envelope: bytes = field(repr=False)
    path: Path
    size: int


class Outbox:
    """Updates by message id.

    Guarantee: what `add` returned is there after a crash, with the same bytes, until `drop`. A folder that a crash left
    unfinished, or that was damaged, counts as not there and is removed.
    """

    def __init__(self, folder: Path) -> None:
        """Open, and take up what a former process left.

        Raises:
            RunError: The folder cannot be written.
        """
        self._folder = folder
        self._updates: dict[bytes, Update] = {}
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in sorted(folder.iterdir()):
                update = _read(entry)
                if update is None:
                    log.warning("outbox_entry_removed", entry=entry.name[:40])
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    self._updates[update.message_id] = update

    def add(self, message_id: bytes, envelope: bytes, blob: Blob, *, run_id: bytes, request_id: bytes) -> Update:
        """Store an update durably. A blob that is a file on the same disk is moved, not copied.

        Raises:
            RunError: The disk is full or cannot be written; nothing is stored.
        """
        final = self._folder / message_id.hex()
        staging = self._folder / f".{message_id.hex()}"
        with disk_errors(final):
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(mode=0o700)
                _put_blob(blob, staging / _BLOB)
                (staging / _ENVELOPE).write_bytes(envelope)
                facts = {
                    "format": 1, "blob_bytes": blob.size, "run_id": run_id.hex(), "request_id": request_id.hex()
                }  # fmt: skip
                (staging / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
                for path in staging.iterdir():
                    sync(path)
                sync(staging)
                staging.rename(final)
                sync(self._folder)
            except OSError:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        update = Update(
            message_id=message_id,
            run_id=run_id,
            request_id=request_id,
            envelope=envelope,
            path=final / _BLOB,
            size=blob.size,
        )
        self._updates[message_id] = update
        return update

    def drop(self, message_id: bytes) -> bool:
        """Forget an update; whether it was there."""
        update = self._updates.pop(message_id, None)
        if update is not None:
            shutil.rmtree(update.path.parent, ignore_errors=True)
        return update is not None

    def get(self, message_id: bytes) -> Update | None:
        """The update to an order, if it waits."""
        return self._updates.get(message_id)

    def __iter__(self) -> Iterator[bytes]:
        """Message ids of all that waits."""
        return iter(list(self._updates))

    def __len__(self) -> int:
        """How many wait."""
        return len(self._updates)


def _put_blob(blob: Blob, path: Path) -> None:
    if blob.path is not None and blob.path.stat().st_dev == path.parent.stat().st_dev:
        blob.path.rename(path)
        return
    with blob.open() as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _read(entry: Path) -> Update | None:
    """The update in a folder, if it is whole."""
    if not _ID.fullmatch(entry.name):
        return None
    try:
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        size, path = facts["blob_bytes"], entry / _BLOB
        if facts["format"] != 1 or path.stat().st_size != size:
            return None
        return Update(
            message_id=bytes.fromhex(entry.name),
            run_id=bytes.fromhex(facts["run_id"]),
            request_id=bytes.fromhex(facts["request_id"]),
            envelope=(entry / _ENVELOPE).read_bytes(),
            path=path,
            size=size,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
