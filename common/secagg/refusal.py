"""The one error of secure aggregation: it names what was looked at, never what was found there."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from common.errors import RefusedError

Reason = Literal[
    "rules",
    "roster",
    "signature",
    "beacon",
    "epoch",
    "index",
    "base",
    "participants",
    "survivors",
    "statement",
    "quorum",
    "threshold",
    "shares",
    "range",
    "format",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

_TEXTS: dict[Reason, tuple[str, str]] = {
    "rules": ("the other side follows other rules", "give every party the same configuration of the run"),
    "roster": ("the roster is not one that is accepted here", "compare the pinned records of all sites"),
    "signature": ("a signature does not verify", "compare the pinned records of all sites"),
    "beacon": (
        "the members' common randomness was not agreed",
        "set up another epoch; a site allows few failures a day",
    ),
    "epoch": ("this party does not take part in that epoch, or not at this step", "it can join the next epoch"),
    "index": ("the index of the round was used before, or is not of this epoch", "use each index once"),
    "base": ("the model was trained on before, in a round that was not given up", "have that round given up first"),
    "participants": ("too few take part, or not the right ones", "start another epoch with those who are there"),
    "survivors": ("the survivors are too few, or not those agreed on", "start another round"),
    "statement": ("another statement was made about this round", "start another round"),
    "quorum": ("too few members signed the same statement", "ask those who have not answered"),
    "threshold": ("no safe threshold exists for so few members", "let more sites take part, or assume fewer colluding"),
    "shares": ("shares are missing or wrong", "give the round up and start another"),
    "range": ("the sum is outside of what its members can send", "look for a member that does not follow the protocol"),
    "format": ("a message is malformed", "run the same version everywhere"),
}


class SecAggError(RefusedError):
    """A step of secure aggregation is refused.

    Attributes:
        reason: What was looked at.
    """

    code: ClassVar[str] = "secagg-refused"

    def __init__(self, reason: Reason, message: str = "", *, hint: str = "") -> None:
        text, usual = _TEXTS[reason]
        super().__init__(message or f"a step of secure aggregation is refused: {text}", hint=hint or usual)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes hand errors on by pickle."""
        return (type(self), (self.reason, str(self)), {"hint": self.hint})
