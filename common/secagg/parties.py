"""What a member of secure aggregation needs from outside: who it is, whom it knows, and a memory that lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from common.errors import RefusedError
from common.secagg.codec import Packed
from common.secagg.keys import label
from common.secagg.refusal import SecAggError


class Record(Protocol):
    """A party's public record, pinned before the run. `common.crypto.PartyRecord` is one."""

    @property
    def name(self) -> str:
        """The party's name."""

    @property
    def key_id(self) -> bytes:
        """Digest of the whole record."""

    def verify(self, label: bytes, message: bytes, signature: bytes) -> None:
        """Check a signature of this party, made for this purpose.

        Raises:
            RefusedError: It does not fit.
        """


class Signer(Protocol):
    """A party's own identity. `common.crypto.PartyKeys` is one."""

    @property
    def record(self) -> Record:
        """What the others pin."""

    def sign(self, label: bytes, message: bytes) -> bytes:
        """Sign a message for one purpose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """A round that an update was, or was going to be, masked in.

    Attributes:
        header: The round's digest, 32 bytes.
        base: Digest of the model that the update starts from.
        participants: Names of the members that were asked, sorted.
        epoch: 16 bytes.
        index: The round's number within the epoch.
    """

    header: bytes
    base: bytes
    participants: tuple[str, ...]
    epoch: bytes
    index: int


class Journal(Protocol):
    """What a member must never forget, one for each run. Secrets are not in it.

    Guarantee:
        Append-only, and on disk before a call returns: a member that restarts still says nothing that contradicts what
        it said before.
    """

    def use(self, use: Use) -> None:
        """Write down a round before its training begins."""

    def find(self, header: bytes) -> Use | None:
        """The round of that digest."""

    def uses(self, base: bytes) -> Sequence[Use]:
        """All rounds that started from a model."""

    def last_index(self, epoch: bytes) -> int:
        """The highest index used in an epoch; 0 if there is none."""

    def state(self, header: bytes, statement: bytes) -> None:
        """Write down the one statement about a round before it is sent."""

    def stated(self, header: bytes) -> bytes | None:
        """That statement."""

    def aborted(self) -> None:
        """Count an epoch that was given up after this member revealed its nonce."""

    def aborts_today(self) -> int:
        """How many were counted in the last 24 hours."""


def verify(record: Record, what: str, message: bytes, signature: bytes) -> None:
    """Check a party's signature for one purpose of secure aggregation.

    Raises:
        SecAggError: `signature`.
    """
    try:
        record.verify(label(what), message, signature)
    except RefusedError as e:
        raise SecAggError("signature") from e


Signed = TypeVar("Signed", bound=Packed)


def signed(message: Signed, what: str, signer: Signer) -> Signed:
    """The same message with its signature in place."""
    signature = signer.sign(label(what), message.body())
    return replace(message, signature=signature)  # type: ignore[type-var]
