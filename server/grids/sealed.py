"""Lets nothing but ciphertext reach the transport, and back only what the right site signed for this very order."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.crypto import (
    KINDS,
    NO_ID,
    Direction,
    Header,
    PartyKeys,
    PartyRecord,
    Sealed,
    SealError,
    open_envelope,
    seal,
)
from common.disk import disk_errors
from common.errors import FailureCode, RefusedError
from common.flower import CONFIG, ROUND, failure_reply
from common.memory import return_freed_memory
from common.transport.records import encode_records, manifest
from common.transport.sealed import (
    NO_DIGEST,
    Blob,
    cohort_digest,
    most_reply_bytes,
    order_id,
    read_records,
    read_sealed,
    sealed_content,
)
from server.grids.base import WrappingGrid, stream_replies

log = structlog.get_logger()

_MUCH: Final = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """One order that was sent: what its answer must fit."""

    message: Message
    record: PartyRecord
    header: Header
    order: bytes
    base: bytes

    def check(self, header: Header) -> None:
        """Refuse an update to another order, of another run, round or kind, or from another model.

        Raises:
            SealError: `context`.
        """
        asked = self.header
        expected = (
            Direction.UP, asked.kind, asked.run_id, asked.server_round, asked.attempt, self.order,
            asked.config_digest, asked.cohort_digest, self.base,
        )  # fmt: skip
        said = (
            header.direction, header.kind, header.run_id, header.server_round, header.attempt, header.reply_to,
            header.config_digest, header.cohort_digest, header.base_digest,
        )  # fmt: skip
        if said != expected:
            raise SealError("context")


@dataclass(kw_only=True, slots=True)
class _Batch:
    """What one call has sealed: each distinct content once, and an order by node id."""

    sealed: dict[int, tuple[Sealed, Blob]] = field(default_factory=dict)
    orders: dict[int, _Asked] = field(default_factory=dict)

    def close(self) -> None:
        """Remove the files of ciphertext."""
        for _, blob in self.sealed.values():
            if blob.path is not None:
                with suppress(OSError):  # the plane's folder is emptied when it starts
                    blob.path.unlink()
        self.sealed.clear()


class SealedGrid(WrappingGrid):
    """Seals what is sent, opens what comes back.

    Each distinct content of a call becomes one ciphertext, for all its recipients, and an envelope for each of them.

    Guarantee: a reply that passes was signed by the pinned keys of the site that was asked, for this order, run, round
    and model, and is no longer than four times the request; every other is the failure INVALID_REPLY. Sizes and
    signature are checked before any key is used, and every byte before it is. A reply is opened when it is asked for:
    of those that wait below, none is in memory. Failures are not sealed, and pass as they are.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        keys: PartyKeys,
        records: Mapping[str, PartyRecord],
        run_id: bytes,
        config_digest: bytes,
        folder: Path | None = None,
        attempts_before: int = 0,
    ) -> None:
        """Wrap a transport.

        Args:
            inner: Carries ciphertext.
            keys: The coordinator's.
            records: Pinned records of the sites, by the names that the inner grid gives their nodes.
            run_id: 16 bytes.
            config_digest: 32 bytes, `RunConfig.digest()`.
            folder: Where ciphertext lies while it is sent; None keeps it in memory.
            attempts_before: How often the run was begun before, by processes that ended.
        """
        super().__init__(inner)
        self._attempts_before = attempts_before
        self._keys = keys
        self._records = records
        self._run_id = run_id
        self._config_digest = config_digest
        self._folder = folder
        self._asked: Counter[tuple[int, int]] = Counter()
        self._pushed: dict[str, _Batch] = {}

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, opened; nodes without a pinned record fail at once.

        Raises:
            RefusedError: A message is of a kind that is never sealed. Nothing was sent.
            RunError: The disk is full or cannot be written.
        """
        batch = _Batch()
        try:
            orders, unknown = self._seal(list(messages), batch)
            yield from unknown
            for reply in stream_replies(self._inner, orders, timeout):
                asked = batch.orders.get(reply.metadata.src_node_id)
                if asked is not None:
                    yield self._opened(reply, asked)
                del reply, asked  # or its ciphertext stays while the next one arrives
        finally:
            batch.close()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Seal and send; the ciphertext is kept until all replies have been pulled."""
        batch = _Batch()
        orders, _ = self._seal(list(messages), batch)
        ids = list(self._inner.push_messages(orders))
        self._pushed |= dict.fromkeys(ids, batch)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to messages that were pushed, opened."""
        opened = []
        for reply in self._inner.pull_messages(list(message_ids)):
            batch = self._pushed.pop(reply.metadata.reply_to_message_id, None)
            if batch is None:
                continue
            asked = batch.orders.get(reply.metadata.src_node_id)
            if asked is not None:
                opened.append(self._opened(reply, asked))
            if not any(pushed is batch for pushed in self._pushed.values()):
                batch.close()
        return opened

    def _seal(self, messages: list[Message], batch: _Batch) -> tuple[list[Message], list[Message]]:
        """The sealed messages, and failures for nodes that nothing can be sealed for."""
        names = {node.node_id: node.name for node in self._inner.get_nodes()}
        orders, unknown = [], []
        for message in messages:
            meta = message.metadata
            record = self._records.get(names.get(meta.dst_node_id, ""))
            if record is None:
                log.warning("no_keys_of_this_site", site=names.get(meta.dst_node_id, ""))
                unknown.append(failure_reply(message, FailureCode.CLIENT_LOST))
                continue
            key = id(message.content)  # all messages of a round share one; each list item keeps its content alive
            if key not in batch.sealed:
                batch.sealed[key] = self._broadcast(message.content, meta.message_type)
            sealed, blob = batch.sealed[key]
            envelope = sealed.envelope_for(record)
            content = sealed_content(envelope, blob)
            order = Message(content, meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)
            orders.append(order)
            batch.orders[meta.dst_node_id] = _Asked(
                message=order, record=record, header=sealed.header, order=order_id(envelope), base=sealed.digest
            )
        return orders, unknown

    def _broadcast(self, content: RecordDict, message_type: str) -> tuple[Sealed, Blob]:
        if message_type not in KINDS:
            raise RefusedError(f"messages of type {message_type!r} are not sealed", hint=f"only {', '.join(KINDS)} are")
        parts = encode_records(content)
        config = content.get(CONFIG)
        said = config if isinstance(config, ConfigRecord) else ConfigRecord()
        server_round = said.get(ROUND, 0)
        kind, number = KINDS[message_type], server_round if isinstance(server_round, int) else 0
        header = Header(
            direction=Direction.DOWN,
            kind=kind,
            run_id=self._run_id,
            server_round=number,
            attempt=self._attempts_before + self._asked[kind, number],
            sender=self._keys.record.key_id,
            message_id=os.urandom(len(NO_ID)),
            reply_to=NO_ID,
            plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
            manifest=manifest(content),
            config_digest=self._config_digest,
            cohort_digest=cohort_digest(said),
            base_digest=NO_DIGEST,
        )
        self._asked[kind, number] += 1
        if self._folder is None:
            memory = io.BytesIO()
            sealed = seal(parts, header, sender=self._keys, sink=memory, broadcast=True)
            return sealed, Blob.of_bytes(memory.getbuffer())
        part = self._folder / f".{header.message_id.hex()}.part"
        with disk_errors(self._folder):
            try:
                with part.open("xb") as file:
                    sealed = seal(parts, header, sender=self._keys, sink=file, broadcast=True)
                path = part.replace(self._folder / sealed.digest.hex())
            finally:
                part.unlink(missing_ok=True)
        return sealed, Blob.of_file(path, sealed.blob_bytes)

    def _opened(self, reply: Message, asked: _Asked) -> Message:
        """The reply with its content in clear, or the failure that stands for it."""
        if reply.has_error():
            return reply
        try:
            content = self._open(reply.content, asked)
        except (RefusedError, OSError) as e:
            layer = e.layer if isinstance(e, SealError) else type(e).__name__
            log.warning("sealed_reply_refused", site=asked.record.name, layer=layer)
            return failure_reply(asked.message, FailureCode.INVALID_REPLY)
        return Message(content, metadata=reply.metadata)  # type: ignore[call-overload,no-any-return]

    def _open(self, content: RecordDict, asked: _Asked) -> RecordDict:
        envelope, blob = read_sealed(content)
        most = most_reply_bytes(asked.header.plaintext_bytes)
        opening = open_envelope(envelope, sender=asked.record, recipient=self._keys, most_bytes=most)
        asked.check(opening.header)
        if opening.blob_digest is not None:  # an update has one recipient
            raise SealError("context")
        if opening.header.plaintext_bytes >= _MUCH:
            return_freed_memory()  # of the frames in which it came: they would lie beside it
        return read_records(
            opening.read,
            blob,
            blob_bytes=opening.blob_bytes,
            plaintext_bytes=opening.header.plaintext_bytes,
            digest=opening.header.manifest,
        )
