"""The fixed header of a sealed message: what it is, whose, for which run. All of it is bound through the keys.

Integers are big-endian. The header is public: it holds nothing that depends on training data but sizes and digests.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from common.crypto.identity import KEY_ID_BYTES, Role, Suite
from common.crypto.refusal import SealError

MAGIC, VERSION = b"COTS", 1
CHUNK_LOG2 = 20
CHUNK_BYTES = 1 << CHUNK_LOG2
MOST_PLAINTEXT_BYTES = CHUNK_BYTES << 32
"""A chunk's number has 32 bits."""

ID_BYTES = 16
NO_ID = bytes(ID_BYTES)
_LAYOUT = struct.Struct(">4sBBBBB16sQI32s16s16sQ32s32s32s32s")
HEADER_BYTES = _LAYOUT.size

KINDS = {"train": 1, "query": 2, "evaluate": 3, "result": 4, "query.secagg": 5}
"""Flower's message types, and the result of a run. The last is a step of secure aggregation."""


class Direction(IntEnum):
    """Who seals for whom."""

    DOWN = 1
    UP = 2
    RESULT = 3


ENDS: dict[Direction, tuple[Role, Role]] = {
    Direction.DOWN: ("coordinator", "site"),
    Direction.UP: ("site", "coordinator"),
    Direction.RESULT: ("coordinator", "operator"),
}
"""Roles of sender and recipient."""

_SUITES, _DIRECTIONS = frozenset(map(int, Suite)), frozenset(map(int, Direction))


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a sealed message says of itself.

    Attributes:
        direction: Who seals for whom.
        kind: A value of `KINDS`.
        run_id: 16 bytes.
        server_round: Counts from 1.
        attempt: How often this was asked before.
        sender: The sender's `key_id`.
        message_id: 16 bytes, random for each message.
        reply_to: The message id of the order that is answered; zeros in an order.
        plaintext_bytes: Exact length of what is sealed.
        manifest: SHA-256 over the names, types and shapes that are sealed.
        config_digest: SHA-256 of the run's configuration.
        cohort_digest: SHA-256 of the cohort's list; zeros where none is told.
        base_digest: SHA-256 of the model that an update starts from; zeros where there is none.
        suite: What the sender signs with; `seal` sets it from the sender's record.
    """

    direction: Direction
    kind: int
    run_id: bytes
    server_round: int
    attempt: int
    sender: bytes
    message_id: bytes
    reply_to: bytes
    plaintext_bytes: int
    manifest: bytes
    config_digest: bytes
    cohort_digest: bytes
    base_digest: bytes
    suite: Suite = Suite.ED25519

    def __post_init__(self) -> None:
        """Refuse what no message can say.

        Raises:
            SealError: `context`, or `limits` for a length.
        """
        digests = (self.manifest, self.config_digest, self.cohort_digest, self.base_digest)
        ids = (self.run_id, self.message_id, self.reply_to)
        if any(len(d) != 32 for d in digests) or any(len(i) != ID_BYTES for i in ids):
            raise SealError("context")
        if len(self.sender) != KEY_ID_BYTES or not 0 <= self.server_round < 1 << 64 or not 0 <= self.attempt < 1 << 32:
            raise SealError("context")
        if self.kind not in KINDS.values() or (self.kind == KINDS["result"]) != (self.direction is Direction.RESULT):
            raise SealError("context")
        if self.direction is Direction.DOWN and self.reply_to != NO_ID:
            raise SealError("context")
        if not 0 <= self.plaintext_bytes <= MOST_PLAINTEXT_BYTES:
            raise SealError("limits")

    def to_bytes(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        return _LAYOUT.pack(
            MAGIC,
            VERSION,
            self.suite,
            CHUNK_LOG2,
            self.direction,
            self.kind,
            self.run_id,
            self.server_round,
            self.attempt,
            self.sender,
            self.message_id,
            self.reply_to,
            self.plaintext_bytes,
            self.manifest,
            self.config_digest,
            self.cohort_digest,
            self.base_digest,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read `to_bytes`; whatever is accepted encodes to the same bytes again.

        Raises:
            SealError: `length`, `version`, `suite`, `limits` or `context`.
        """
        if len(data) != HEADER_BYTES:
            raise SealError("length")
        magic, version, suite, chunk, direction, kind, *rest = _LAYOUT.unpack(data)
        if (magic, version) != (MAGIC, VERSION):
            raise SealError("version")
        if suite not in _SUITES:
            raise SealError("suite")
        if chunk != CHUNK_LOG2:
            raise SealError("limits")
        if direction not in _DIRECTIONS:
            raise SealError("context")
        run_id, server_round, attempt, sender, message_id, reply_to, size, manifest, config, cohort, base = rest
        return cls(
            direction=Direction(direction),
            kind=kind,
            run_id=run_id,
            server_round=server_round,
            attempt=attempt,
            sender=sender,
            message_id=message_id,
            reply_to=reply_to,
            plaintext_bytes=size,
            manifest=manifest,
            config_digest=config,
            cohort_digest=cohort,
            base_digest=base,
            suite=Suite(suite),
        )

    @property
    def digest(self) -> bytes:
        """SHA-256 of the header as it travels."""
        return hashlib.sha256(self.to_bytes()).digest()
