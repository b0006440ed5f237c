"""Opens what the coordinator sealed for this site, and seals the answer to it. Nothing in clear is taken or sent."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from common.crypto import (
    KINDS,
    NO_ID,
    Direction,
    Header,
    Opening,
    PartyKeys,
    PartyRecord,
    SealError,
    open_envelope,
    seal,
)
from common.disk import sync
from common.errors import FailureCode, PeerError, RefusedError
from common.flower import ROUND, RUN, RUN_HEX, config_of
from common.transport.records import encode_records, manifest
from common.transport.sealed import NO_DIGEST, Blob, cohort_digest, order_id, read_records, read_sealed, sealed_content

MOST_BYTES: Final = 16 << 30
"""Longest message that is opened, unless the site says otherwise."""

_MOST_STARTS: Final = 3
_BEGUN, _ANSWERED = b"\1", b"\2"


class ReplayGuard:
    """Which orders of the coordinator this site has taken: one file a run, only ever appended to, on disk before work.

    An order that a killed process has left unanswered is taken again after a restart, at most twice: the coordinator
    still waits for it, and nothing of it has left.

    Guarantee: an order that was answered is never taken again, nor one that this process has begun.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._runs: dict[bytes, dict[bytes, int]] = {}
        self._here: set[bytes] = set()

    def begin(self, run_id: bytes, message_id: bytes) -> None:
        """Take an order. To be called once its sender is known.

        Raises:
            PeerError: It was taken before.
            OSError: That cannot be written; the order is not taken.
        """
        with self._lock:
            starts = self._starts(run_id).get(message_id, 0)
            if message_id in self._here or starts >= _MOST_STARTS:
                raise PeerError(FailureCode.INVALID_REQUEST)
            self._append(run_id, _BEGUN + message_id)
            self._starts(run_id)[message_id] = starts + 1
            self._here.add(message_id)

    def answered(self, run_id: bytes, message_id: bytes) -> None:
        """Never take this order again."""
        with self._lock:
            self._starts(run_id)[message_id] = _MOST_STARTS
            self._append(run_id, _ANSWERED + message_id)

    def _starts(self, run_id: bytes) -> dict[bytes, int]:
        if run_id not in self._runs:
            starts: dict[bytes, int] = {}
            with suppress(FileNotFoundError):
                data = self._path(run_id).read_bytes()
                size = 1 + len(NO_ID)
                for at in range(0, len(data) - size + 1, size):  # a killed process can leave a part of the last one
                    tag, message_id = data[at : at + 1], data[at + 1 : at + size]
                    starts[message_id] = _MOST_STARTS if tag == _ANSWERED else starts.get(message_id, 0) + 1
            self._runs[run_id] = starts
        return self._runs[run_id]

    def _append(self, run_id: bytes, entry: bytes) -> None:
        path = self._path(run_id)
        new = not path.exists()
        if new:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(file.tell() // len(entry) * len(entry))
            file.write(entry)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(self._folder)

    def _path(self, run_id: bytes) -> Path:
        return self._folder / f"{run_id.hex()}.seen"


def sealed_mod(
    keys_of: Callable[[Context], PartyKeys],
    coordinator: PartyRecord,
    *,
    folder: Path | None = None,
    seen: ReplayGuard | None = None,
    most_bytes: int = MOST_BYTES,
) -> Mod:
    """A mod that hands on only what the coordinator signed for this site, run and round, and never twice.

    It belongs around every kind of message, just inside the guard. Failures are not sealed: they are fixed codes.

    Args:
        keys_of: The keys of the client that a context stands for.
        coordinator: Its pinned record.
        folder: Where sealed answers are written, for whoever sends them to move or remove; None keeps them in memory.
        seen: Refuses orders that were taken before; None where a transport cannot replay, as in a simulation.
        most_bytes: Longest message that is opened.

    Raises (the mod):
        PeerError: The message is not sealed, or not by the coordinator for this site, or does not belong to the run
            and round that it speaks of, or was taken before.
    """

    def sealed(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        keys = keys_of(context)
        try:
            envelope, blob = read_sealed(message.content)
            opening = open_envelope(envelope, sender=coordinator, recipient=keys, most_bytes=most_bytes)
            content = _read(opening, blob, kind=KINDS.get(message.metadata.message_type))
        except (RefusedError, KeyError) as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e
        asked = opening.header
        if seen is not None:
            seen.begin(asked.run_id, asked.message_id)
        try:
            reply = call_next(Message(content, metadata=message.metadata), context)  # type: ignore[call-overload]
            if reply.has_content():
                order = order_id(envelope)
                answer = _answer(opening, order, reply.content, keys, to=coordinator, folder=folder)
                reply = Message(answer, reply_to=message)
        except Exception:
            if seen is not None:
                seen.answered(asked.run_id, asked.message_id)
            raise
        if seen is not None:
            seen.answered(asked.run_id, asked.message_id)
        return reply

    return sealed


def _read(opening: Opening, blob: Blob, *, kind: int | None) -> RecordDict:
    """The content in clear, once everything about it fits.

    Raises:
        RefusedError: Something does not fit.
        KeyError: The content says nothing of a run.
    """
    header = opening.header
    if header.direction is not Direction.DOWN or header.kind != kind or opening.blob_digest is None:
        raise SealError("context")
    content = read_records(
        opening.read,
        blob,
        blob_bytes=opening.blob_bytes,
        plaintext_bytes=header.plaintext_bytes,
        digest=header.manifest,
    )
    config = config_of(content)
    if (
        hashlib.sha256(str(config[RUN]).encode()).digest() != header.config_digest
        or config[ROUND] != header.server_round
        or config.get(RUN_HEX, header.run_id.hex()) != header.run_id.hex()
        or cohort_digest(config) != header.cohort_digest
    ):
        raise SealError("context")
    return content


def _answer(
    opening: Opening, order: bytes, content: RecordDict, keys: PartyKeys, *, to: PartyRecord, folder: Path | None
) -> RecordDict:
    """The content sealed as the answer to an order, in a file if there is a folder for it."""
    asked, parts = opening.header, encode_records(content)
    header = Header(
        direction=Direction.UP,
        kind=asked.kind,
        run_id=asked.run_id,
        server_round=asked.server_round,
        attempt=asked.attempt,
        sender=keys.record.key_id,
        message_id=os.urandom(len(NO_ID)),
        reply_to=order,
        plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
        manifest=manifest(content),
        config_digest=asked.config_digest,
        cohort_digest=asked.cohort_digest,
        base_digest=opening.blob_digest or NO_DIGEST,
    )
    if folder is None:
        memory = io.BytesIO()
        sealed = seal(parts, header, sender=keys, sink=memory, broadcast=False)
        return sealed_content(sealed.envelope_for(to), Blob.of_bytes(memory.getbuffer()))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{header.message_id.hex()}.sealed"
    try:
        with path.open("xb") as file:
            sealed = seal(parts, header, sender=keys, sink=file, broadcast=False)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return sealed_content(sealed.envelope_for(to), Blob.of_file(path, sealed.blob_bytes))
