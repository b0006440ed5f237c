"""Every message of secure aggregation, in the order in which they are sent.

`docs/secure-aggregation.md` says what each is for. A message that carries a signature has it as its last field, over
everything before it, under a label that is the message's own (`Bundle`: "bundle"); `Offers` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final

from common.secagg.codec import (
    RANK,
    By,
    ByRank,
    Digest,
    Fixed,
    Id,
    Index,
    Many,
    Name,
    Packed,
    Ranks,
    Signature,
    Text,
    Varied,
)
from common.secagg.keys import digest, ranks
from common.secagg.refusal import SecAggError
from common.secagg.shamir import SHARE_BYTES

CIPHERTEXT_BYTES: Final = 1088
"""Of ML-KEM-768."""
_Bundles = Annotated[tuple[bytes, ...], Many(Varied(1 << 14))]
_Signatures = Annotated[dict[int, bytes], By(RANK, Varied(1 << 13))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Advertise(Packed):
    """Down: make keys for an epoch."""

    KIND: ClassVar[int] = 1
    epoch: Id
    rules: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle(Packed):
    """Up: a member's keys for one epoch. `nonce` is the commitment to its part of the beacon."""

    KIND: ClassVar[int] = 2
    epoch: Id
    name: Name
    key_id: Digest
    x25519: Annotated[bytes, Fixed(32)] = field(repr=False)
    ml_kem: Annotated[bytes, Fixed(1184)] = field(repr=False)
    nonce: Digest = field(repr=False)
    rules: Digest = field(repr=False)
    signature: Signature = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reveal(Packed):
    """Down, where a beacon is needed: the roster, as bundles sorted by name. A rank is a place in it, from 0."""

    KIND: ClassVar[int] = 3
    epoch: Id
    bundles: _Bundles = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nonce(Packed):
    """Up: a member's part of the beacon, for this roster."""

    KIND: ClassVar[int] = 4
    epoch: Id
    roster: Digest
    nonce: Digest = field(repr=False)
    signature: Signature = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange(Packed):
    """Down: the roster, and every member's `Nonce` where a beacon is needed."""

    KIND: ClassVar[int] = 5
    epoch: Id
    bundles: _Bundles = field(repr=False)
    nonces: ByRank = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offers(Packed):
    """Up: what a member encapsulated to its neighbours. The signature is over `offered`, so that each can check it."""

    KIND: ClassVar[int] = 6
    epoch: Id
    group: Digest
    ciphertexts: Annotated[dict[int, bytes], By(RANK, Fixed(CIPHERTEXT_BYTES))] = field(repr=False)
    signature: Signature = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer(Packed):
    """Within `Deposit`: one neighbour's ciphertext for this member, and what its signature is over."""

    KIND: ClassVar[int] = 7
    digests: Annotated[dict[int, bytes], By(RANK, Fixed(32))] = field(repr=False)
    ciphertext: Annotated[bytes, Fixed(CIPHERTEXT_BYTES)] = field(repr=False)
    signature: Signature = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deposit(Packed):
    """Down: an `Offer` of each neighbour that encapsulated to this member."""

    KIND: ClassVar[int] = 8
    epoch: Id
    offers: ByRank = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deposited(Packed):
    """Up: vaults and commitments (b then kappa, round by round), and for each neighbour its sealed shares.

    A vault holds the round's keys of the pairs with those neighbours, in the order of `shares`.
    """

    KIND: ClassVar[int] = 9
    epoch: Id
    group: Digest
    vaults: Annotated[tuple[bytes, ...], Many(Varied())] = field(repr=False)
    commitments: Annotated[tuple[bytes, ...], Many(Fixed(32))] = field(repr=False)
    shares: ByRank = field(repr=False)
    signature: Signature = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbox(Packed):
    """Down: the neighbours' sealed shares for this member."""

    KIND: ClassVar[int] = 17
    epoch: Id
    shares: ByRank = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready(Packed):
    """Up: the shares are there, and this member can be asked to train."""

    KIND: ClassVar[int] = 18
    epoch: Id


@dataclass(frozen=True, kw_only=True, slots=True)
class Train(Packed):
    """Down, beside the model, the same for all: mask an update in this round. `certificates` are `Certificate`s."""

    KIND: ClassVar[int] = 10
    epoch: Id
    index: Index
    participants: Ranks = field(repr=False)
    certificates: Annotated[tuple[bytes, ...], Many(Varied())] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agree(Packed):
    """Down: state that these are the survivors."""

    KIND: ClassVar[int] = 11
    epoch: Id
    index: Index
    survivors: Ranks = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Burn(Packed):
    """Down: state that a round is given up."""

    KIND: ClassVar[int] = 12
    header: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement(Packed):
    """Up: the one thing that a member ever says about a round. Without survivors it says: burnt."""

    KIND: ClassVar[int] = 13
    header: Digest
    survivors: Ranks = field(repr=False)
    signature: Signature = field(repr=False)

    @property
    def burnt(self) -> bool:
        """Whether it says that the round is given up."""
        return not self.survivors


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmask(Packed):
    """Down: release the shares; with a quorum's signatures of the statement on these survivors."""

    KIND: ClassVar[int] = 14
    epoch: Id
    index: Index
    survivors: Ranks = field(repr=False)
    signatures: _Signatures = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Released(Packed):
    """Up: of each participant that shares are held of, one: of b if it survived, else of kappa."""

    KIND: ClassVar[int] = 15
    header: Digest
    shares: Annotated[dict[int, bytes], By(RANK, Fixed(SHARE_BYTES))] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate(Packed):
    """Within `Train`: a quorum's signatures that a round is given up, by name, as the epoch may be over."""

    KIND: ClassVar[int] = 16
    header: Digest
    signatures: Annotated[dict[str, bytes], By(Text(), Varied(1 << 13))] = field(repr=False)


_KINDS: Final[tuple[type[Packed], ...]] = (
    Advertise,
    Bundle,
    Reveal,
    Nonce,
    Exchange,
    Offers,
    Offer,
    Deposit,
    Deposited,
    Inbox,
    Ready,
    Train,
    Agree,
    Burn,
    Statement,
    Unmask,
    Released,
    Certificate,
)
_NAMES: Final = {kind.KIND: kind.__name__.lower() for kind in _KINDS}


def kind_of(data: bytes) -> str:
    """Which message this is, by the name of its class in small letters; the rest of it is not looked at.

    Raises:
        SecAggError: `format`: it is none.
    """
    if len(data) < 2 or data[0] not in _NAMES or data[1] != Packed.VERSION:
        raise SecAggError("format")
    return _NAMES[data[0]]


def offered(group: bytes, name: str, digests: Mapping[int, bytes]) -> bytes:
    """What a member signs of its offers: whose they are, for whom, and the SHA-256 of each."""
    receivers = sorted(digests)
    return digest("offers", group, name.encode(), ranks(receivers), b"".join(digests[rank] for rank in receivers))
