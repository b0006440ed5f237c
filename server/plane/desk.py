"""What operators' calls are answered by. The plane knows who asks; what may be asked is the desk's business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.crypto import PeerIdentity

Document = Mapping[str, Any]
"""What JSON can say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A result, sealed for the operator who asked.

    Attributes:
        envelope: Sent first.
        path: File with the ciphertext. To continue a broken download, the same question has to be answered with the
            same envelope and bytes again.
    """

    envelope: bytes = field(repr=False)
    path: Path


class OperatorDesk(Protocol):
    """Answers operators. Every method is called in a thread of its own and may block; several run at once.

    A `CoterieError` becomes the document `{"error": {"code", "message", "hint", "exit_code"}}`: operators are trusted
    with the service's own messages. Any other exception is a fault, of which the operator learns nothing.
    """

    def submit(self, identity: PeerIdentity, text: str, authorization: str) -> Document:
        """Queue a run: `text` is the canonical JSON of its configuration."""
        ...

    def ask(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Document:
        """One answer; `what` is unchecked."""
        ...

    def follow(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Iterator[Document | None]:
        """Answers as they come. Yields None at least every few seconds while there is nothing new, so that the plane
        can end it; it is closed when the operator goes.
        """
        ...

    def download(self, identity: PeerIdentity, run: str) -> Download:
        """The result of a run."""
        ...
