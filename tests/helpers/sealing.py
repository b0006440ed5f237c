"""Parties with keys, and a site that a test plays itself, down to each field of what it seals."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from common.crypto import NO_ID, Direction, Header, PartyKeys, Sealed, open_envelope, seal
from common.flower import ARRAYS, CONFIG, ROUND, RUN, NodeInfo, prepare_process, to_record
from common.transport.records import decode_records, encode_records, manifest
from common.transport.sealed import Blob, order_id, read_sealed, sealed_content
from server.grids import SealedGrid
from server.grids.base import FIRST_NODE
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.runs import configuration

prepare_process()

CONFIGURATION = configuration()
CONFIG_DIGEST = bytes.fromhex(CONFIGURATION.digest())
RUN_ID = bytes(range(16))
COORDINATOR = PartyKeys.generate("coordinator", "coordinator")
NORTH, SOUTH = PartyKeys.generate("north", "site"), PartyKeys.generate("south", "site")
SITES = (NORTH, SOUTH)
RECORDS = {keys.record.name: keys.record for keys in SITES}
MODEL = {"w": np.arange(600, dtype=np.float32).reshape(20, 30) / 7, "b": np.ones(3, np.float32)}
MOST = 1 << 30

Arrays = Mapping[str, NDArray[Any]]


def request(*, arrays: Arrays = MODEL, **said: Any) -> RecordDict:
    """What the coordinator asks; `said` changes or (None) removes what its configuration says."""
    config: dict[str, Any] = {RUN: CONFIGURATION.canonical_json(), ROUND: 1} | said
    kept = {key: value for key, value in config.items() if value is not None}
    return RecordDict({ARRAYS: to_record(arrays), CONFIG: ConfigRecord(kept)})


def messages(content: RecordDict | None = None, *, sites: int = 2) -> list[Message]:
    """One message for each site, all with the same content."""
    content = content or request()
    return [Message(content, FIRST_NODE + i, "train") for i in range(sites)]


class Nodes(ScriptedGrid):
    """A transport with one node for each site, in order; a test answers for them."""

    def __init__(self, answer: Callable[[list[Message]], Iterable[Message]], names: Sequence[str] = tuple(RECORDS)):
        super().__init__(answer, [FIRST_NODE + i for i in range(len(names))])
        self._names = names

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=name) for node, name in zip(self.nodes, self._names, strict=True)]


def sealed_grid(inner: ScriptedGrid, folder: Path | None = None) -> SealedGrid:
    return SealedGrid(
        inner, keys=COORDINATOR, records=RECORDS, run_id=RUN_ID, config_digest=CONFIG_DIGEST, folder=folder
    )


def opened(order: Message, keys: PartyKeys) -> tuple[Header, RecordDict]:
    """What a site reads in its order."""
    envelope, blob = read_sealed(order.content)
    opening = open_envelope(envelope, sender=COORDINATOR.record, recipient=keys, most_bytes=MOST)
    plain = bytearray(opening.header.plaintext_bytes)
    with blob.open() as source:
        opening.read(source, plain)
    return opening.header, decode_records(plain)


def sealed_up(
    order: Message, keys: PartyKeys, content: RecordDict | None = None, *, broadcast: bool = False, **changes: Any
) -> tuple[bytes, bytes]:
    """Envelope and ciphertext of an answer by `keys`; `changes` replace fields of its header."""
    envelope, _ = read_sealed(order.content)
    asked = open_envelope(envelope, sender=COORDINATOR.record, recipient=keys, most_bytes=MOST)
    content = content or update({name: values + 1 for name, values in MODEL.items()}, train_loss=0.5)
    parts = encode_records(content)
    header = Header(
        direction=Direction.UP,
        kind=asked.header.kind,
        run_id=asked.header.run_id,
        server_round=asked.header.server_round,
        attempt=asked.header.attempt,
        sender=keys.record.key_id,
        message_id=os.urandom(16),
        reply_to=order_id(envelope),
        plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
        manifest=manifest(content),
        config_digest=asked.header.config_digest,
        cohort_digest=asked.header.cohort_digest,
        base_digest=asked.blob_digest or bytes(32),
    )
    sink = io.BytesIO()
    sealed = seal(parts, replace(header, **changes), sender=keys, sink=sink, broadcast=broadcast)
    return sealed.envelope_for(COORDINATOR.record), sink.getvalue()


def reply(order: Message, envelope: bytes, ciphertext: bytes) -> Message:
    return Message(sealed_content(envelope, Blob.of_bytes(ciphertext)), reply_to=order)


def answer(order: Message, keys: PartyKeys, content: RecordDict | None = None, **changes: Any) -> Message:
    """An honest answer, but for the changes."""
    return reply(order, *sealed_up(order, keys, content, **changes))


def sealed_down(content: RecordDict, *, by: PartyKeys = COORDINATOR, **changes: Any) -> tuple[Sealed, bytes]:
    """A broadcast of the coordinator, or of one who poses as it; `changes` replace fields of its header."""
    parts = encode_records(content)
    header = Header(
        direction=Direction.DOWN,
        kind=1,
        run_id=RUN_ID,
        server_round=1,
        attempt=0,
        sender=by.record.key_id,
        message_id=os.urandom(16),
        reply_to=NO_ID,
        plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
        manifest=manifest(content),
        config_digest=CONFIG_DIGEST,
        cohort_digest=bytes(32),
        base_digest=bytes(32),
    )
    sink = io.BytesIO()
    return seal(parts, replace(header, **changes), sender=by, sink=sink, broadcast=True), sink.getvalue()


def order_for(keys: PartyKeys, content: RecordDict | None = None, *, kind: str = "train", **changes: Any) -> Message:
    """A message that reaches a site."""
    sealed, ciphertext = sealed_down(content or request(), **changes)
    return Message(sealed_content(sealed.envelope_for(keys.record), Blob.of_bytes(ciphertext)), FIRST_NODE, kind)


def everything(content: RecordDict) -> bytes:
    """All bytes of a content, as a transport would carry them."""
    return b"".join(bytes(part) for part in encode_records(content))
