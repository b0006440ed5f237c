"""What a member keeps of an epoch, and when it forgets what.

Erased means: no reference is left. Python cannot wipe memory, and neither can the libraries that hold keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, ClassVar, Final

from common.secagg.codec import RANK, By, ByRank, Fixed, Id, Index, Many, Name, Names, Number, Packed, Ranks, Varied
from common.secagg.graph import least_neighbours_within
from common.secagg.keys import KEY_BYTES
from common.secagg.parameters import Rules, Shape, shape_of
from common.secagg.parties import Journal, Record, Signer
from common.secagg.refusal import SecAggError
from common.secagg.shamir import SHARE_BYTES

SHARES_A_ROUND: Final = 2 * SHARE_BYTES
"""Of one neighbour: a share of b, then one of kappa."""


class Step(IntEnum):
    """The last leg of an epoch's set-up that a member has answered; `USED` once a round began."""

    ADVERTISED = 1
    REVEALED = 2
    EXCHANGED = 3
    DEPOSITED = 4
    READY = 5
    USED = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """A member's identity, whom it knows, and what it goes by."""

    name: str
    signer: Signer
    peers: Mapping[str, Record]
    rules: Rules
    journal: Journal
    most_aborts: int


_Secret = Annotated[bytes, Varied()]
_Keys = Annotated[dict[int, bytes], By(RANK, Fixed(KEY_BYTES))]


@dataclass(kw_only=True, slots=True, repr=False)
class Epoch(Packed):
    """One epoch, from its first message to its last round.

    Attributes:
        id: 16 bytes.
        step: A `Step`.
        answers: By step: SHA-256 of what was asked, then what was answered; until `USED`.
        x25519, ml_kem: Private keys, until `EXCHANGED` and until `DEPOSITED`.
        nonce: This member's part of the beacon, until `EXCHANGED`.
        roster: Digest of the roster that was checked.
        names: The roster.
        group: Digest of this member's group.
        ring: Ranks of the group in the beacon's order.
        rank: This member's own.
        neighbours: Ranks.
        secrets: z_ij of those that this member encapsulated to, until `DEPOSITED`.
        agreed: The X25519 secrets with those that encapsulate to it, until `DEPOSITED`.
        pair_keys: By neighbour k_ij,r of the rounds after `index`. Who is not here has no part in a round with us.
        self_keys: b_r of the rounds after `index`.
        channels: By neighbour the key that opens its shares, until `READY`.
        held: By neighbour its shares of the rounds from `index` on, from `READY` on.
        index: The round that began last, 0 before the first.
        header, participants: Of that round.
        masked: Whether an update was masked in it.
    """

    KIND: ClassVar[int] = 64
    id: Id
    step: Annotated[int, Number(1, most=Step.USED)]
    answers: Annotated[dict[int, bytes], By(Number(1), Varied())] = field(default_factory=dict)
    x25519: _Secret = b""
    ml_kem: _Secret = b""
    nonce: _Secret = b""
    roster: Annotated[bytes, Varied(32)] = b""
    names: Names = ()
    group: Annotated[bytes, Varied(32)] = b""
    ring: Annotated[tuple[int, ...], Many(RANK)] = ()
    rank: Index = 0
    neighbours: Ranks = ()
    secrets: _Keys = field(default_factory=dict)
    agreed: _Keys = field(default_factory=dict)
    pair_keys: ByRank = field(default_factory=dict)
    self_keys: _Secret = b""
    channels: _Keys = field(default_factory=dict)
    held: ByRank = field(default_factory=dict)
    index: Index = 0
    header: Annotated[bytes, Varied(32)] = b""
    participants: Ranks = ()
    masked: Annotated[int, Number(1, most=1)] = 0

    def __repr__(self) -> str:
        return f"Epoch(id={self.id.hex()}, step={Step(self.step).name}, index={self.index})"

    def shape(self, rules: Rules) -> Shape:
        """The numbers of this member's group."""
        return shape_of(len(self.ring), rules=rules)

    def answered(self, step: Step, request: bytes) -> bytes | None:
        """What this request was answered with before; None if it can be answered now.

        Raises:
            SecAggError: As `again`.
        """
        return None if self.step < step else self.again(step, request)

    def again(self, step: Step, request: bytes) -> bytes:
        """What this request was answered with before.

        Raises:
            SecAggError: `epoch`: the step came and went; `roster`: another request was answered.
        """
        stored = self.answers.get(step)
        if stored is None:
            raise SecAggError("epoch")
        if stored[:32] != hashlib.sha256(request).digest():
            raise SecAggError("roster")
        return stored[32:]

    def answer(self, step: Step, request: bytes, reply: bytes) -> bytes:
        """Take a step: from now on this request has this answer, and no other has any."""
        self.answers[step], self.step = hashlib.sha256(request).digest() + reply, step
        return reply

    def check_neighbours(self, participants: tuple[int, ...], shape: Shape) -> None:
        """Whether this member has neighbours enough among the participants.

        Raises:
            SecAggError: `participants`.
        """
        if len(set(self.neighbours) & set(participants)) < shape.least_neighbours:
            raise SecAggError("participants")

    def check_survivors(self, survivors: tuple[int, ...], shape: Shape) -> None:
        """Whether all survivors have neighbours enough among them: those whom nobody else speaks up for, too.

        Raises:
            SecAggError: `survivors`.
        """
        if shape.least_neighbours:
            ring, inside = [self.names[rank] for rank in self.ring], {self.names[rank] for rank in survivors}
            if least_neighbours_within(ring, shape.degree, inside) < shape.least_neighbours:
                raise SecAggError("survivors")

    def start(self, index: int) -> tuple[bytes, dict[int, bytes]]:
        """Begin a round: give away its secrets, and erase them here with those of all rounds before it.

        Returns:
            b_r, and k_ij,r by neighbour.
        """
        skipped = index - self.index - 1
        at, behind = KEY_BYTES * skipped, KEY_BYTES * (skipped + 1)
        b, pairs = self.self_keys[at:behind], {j: keys[at:behind] for j, keys in self.pair_keys.items()}
        self.self_keys = self.self_keys[behind:]
        self.pair_keys = {j: keys[behind:] for j, keys in self.pair_keys.items()}
        over = SHARES_A_ROUND * (index - max(self.index, 1))
        self.held = {j: shares[over:] for j, shares in self.held.items()}
        self.index, self.step, self.masked = index, Step.USED, 0
        self.answers = {}
        return b, pairs


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Saved(Packed):
    """A whole member."""

    KIND: ClassVar[int] = 65
    name: Name
    rules: Annotated[bytes, Fixed(32)]
    most_aborts: Annotated[int, Number(4)]
    epochs: Annotated[tuple[bytes, ...], Many(Varied())]
