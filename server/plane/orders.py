"""What a run and the plane hand to each other: orders down, answers and failures up, and what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import FailureCode


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One sealed request to one site.

    Attributes:
        message_id: 16 random bytes of this order alone, by which everybody names it. It is not the sealed container's:
            a broadcast has one container, and so one id there, for all of its recipients.
        site: Name of the site.
        kind: Flower's message type.
        envelope: Sealed for this site.
        blob: File with the ciphertext; must stay until the order is closed.
        blob_digest: SHA-256 of the file.
        blob_bytes: Its size.
        most_bytes: Most ciphertext that an answer may have.
        deadline: When nobody waits any more, by `time.monotonic`; None: never.
    """

    message_id: bytes
    site: str
    kind: str
    envelope: bytes = field(repr=False)
    blob: Path
    blob_digest: bytes
    blob_bytes: int
    most_bytes: int
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The sealed update to an order, complete on the disk, nothing of it verified. Who takes it removes `path`."""

    message_id: bytes
    site: str
    envelope: bytes = field(repr=False)
    path: Path
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An order ended without an update."""

    message_id: bytes
    site: str
    failure: FailureCode


Result = Answer | Failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """Where the results of orders go; both are called from the plane's thread and must return at once.

    Attributes:
        result: Called exactly once for an order that is not cancelled before.
        late: Called when an update or failure comes after the order was cancelled, at most once an order.
    """

    result: Callable[[Result], None]
    late: Callable[[str, bytes], None] = lambda _site, _message_id: None


Kind = Literal[
    "attached",
    "detached",
    "order-sent",
    "answer-received",
    "failure-received",
    "late",
    "refused",
    "renewed",
    "list-changed",
    "enrolled",
    "denied",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that an audit log records.

    Attributes:
        kind: What happened.
        party: Name of the party at the other end.
        message_id: The order that it is about; empty if none.
        detail: A short fixed code, a digest or a size; never text from a peer.
    """

    kind: Kind
    party: str
    message_id: bytes = b""
    detail: str = ""


Observer = Callable[[Event], None]
"""Told of every event, from any thread; must be quick. What it raises is logged, and changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A site that is attached.

    Attributes:
        site: Its name.
        since: When it attached, seconds since the epoch.
        heard: When it last said something, by the hub's clock.
        version: Version of its software, as it says.
        state: idle, fetching, working or sending, as it says.
        working_on: Message id of the order it works on, as it says; or empty.
        open_orders: Orders that wait for its answer.
    """

    site: str
    since: float
    heard: float
    version: str
    state: str
    working_on: bytes
    open_orders: int
