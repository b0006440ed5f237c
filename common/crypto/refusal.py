"""The one error of everything sealed or signed: it names the layer that refused, never what was found there."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from common.errors import RefusedError

Layer = Literal[
    "length",
    "version",
    "suite",
    "limits",
    "sender",
    "recipient",
    "signature",
    "wrap",
    "commitment",
    "chunk",
    "truncated",
    "digest",
    "context",
]
"""What is looked at, in no particular order: `open_envelope` says in which."""

LAYERS: tuple[Layer, ...] = get_args(Layer)

_SENTENCES: dict[Layer, str] = {
    "length": "it is longer or shorter than it may be",
    "version": "it is not of a version that is known here",
    "suite": "it is not of the suite that its sender's record names",
    "limits": "it claims to be larger than is allowed here",
    "sender": "it is not from the party that was expected",
    "recipient": "it is not for this party",
    "signature": "a signature does not verify",
    "wrap": "its key cannot be opened",
    "commitment": "its key is not the one that its sender committed to",
    "chunk": "a chunk is damaged, or not in its place",
    "truncated": "it ends too early",
    "digest": "it is not the ciphertext that its sender signed",
    "context": "it does not belong here",
}


class SealError(RefusedError):
    """Something sealed or signed is refused.

    Attributes:
        layer: The first check that failed.
    """

    code: ClassVar[str] = "seal-refused"

    def __init__(self, layer: Layer, message: str = "", *, hint: str = "") -> None:
        super().__init__(message or f"a sealed message is refused: {_SENTENCES[layer]}", hint=hint)
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes hand errors on by pickle."""
        return (type(self), (self.layer, str(self)), {"hint": self.hint})
