"""What a call of `SealedGrid` has sealed and sent: ciphertext, and what each answer must fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from flwr.app import Message

from common.crypto import Direction, Header, PartyRecord, Sealed, SealError
from common.transport.sealed import Blob


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
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
class Batch:
    """What one call has sealed: each distinct content once, and an order by node id."""

    sealed: dict[int, tuple[Sealed, Blob]] = field(default_factory=dict)
    orders: dict[int, Asked] = field(default_factory=dict)

    def close(self) -> None:
        """Remove the files of ciphertext."""
        for _, blob in self.sealed.values():
            if blob.path is not None:
                with suppress(OSError):  # the plane's folder is emptied when it starts
                    blob.path.unlink()
        self.sealed.clear()
