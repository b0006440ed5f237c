"""Lets nothing but ciphertext reach the transport, and back only what the right site signed for this very order."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
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
from common.flower import CONFIG, ROUND, answering, failure_reply
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
from server.grids.outstanding import cancel, pull, push
from server.grids.sealed_orders import Asked, Batch

log = structlog.get_logger()

_MUCH: Final = 16 << 20


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
        self._pushed: dict[str, Batch] = {}
        self._unknown: dict[str, Message] = {}
        self._numbers = count(1)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, opened; nodes without a pinned record fail at once.

        Raises:
            RefusedError: A message is of a kind that is never sealed. Nothing was sent.
            RunError: The disk is full or cannot be written.
        """
        batch = Batch()
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

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Seal and send; the ciphertext is kept until nobody waits for any of the replies.

        Raises:
            RefusedError: A message is of a kind that is never sealed. Nothing was sent.
            RunError: The disk is full or cannot be written.
        """
        messages, batch = list(messages), Batch()
        try:
            orders, unknown = self._seal(messages, batch)
            ids = dict(zip((order.metadata.dst_node_id for order in orders), self._sent(orders, timeout), strict=True))
        except BaseException:
            batch.close()
            raise
        self._pushed |= {message_id: batch for message_id in ids.values() if message_id}
        self._let_go(batch)
        for failure in unknown:
            node = failure.metadata.src_node_id
            ids[node] = f"unknown-{node}-{next(self._numbers)}"
            self._unknown[ids[node]] = answering(failure, ids[node])
        return [ids[message.metadata.dst_node_id] for message in messages]

    def _sent(self, orders: list[Message], timeout: float | None) -> list[str]:
        return push(self._inner, orders, timeout=timeout) if orders else []

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        """Replies to messages that were pushed, opened; those that nothing could be sealed for are failures."""
        wanted = list(message_ids)
        unknown = [self._unknown.pop(message_id) for message_id in wanted if message_id in self._unknown]
        if unknown:
            return unknown
        opened = []
        for reply in pull(self._inner, wanted, needed=needed):
            batch = self._pushed.pop(reply.metadata.reply_to_message_id, None)
            if batch is None:
                continue
            asked = batch.orders.get(reply.metadata.src_node_id)
            if asked is not None:
                opened.append(self._opened(reply, asked))
            self._let_go(batch)
        return opened

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """Wait no more for these."""
        ids = list(message_ids)
        cancel(self._inner, ids)
        for message_id in ids:
            self._unknown.pop(message_id, None)
            batch = self._pushed.pop(message_id, None)
            if batch is not None:
                self._let_go(batch)

    def _let_go(self, batch: Batch) -> None:
        """Remove ciphertext that nobody is to fetch any more."""
        if not any(pushed is batch for pushed in self._pushed.values()):
            batch.close()

    def _seal(self, messages: list[Message], batch: Batch) -> tuple[list[Message], list[Message]]:
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
            batch.orders[meta.dst_node_id] = Asked(
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

    def _opened(self, reply: Message, asked: Asked) -> Message:
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

    def _open(self, content: RecordDict, asked: Asked) -> RecordDict:
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
