"""Who is in an epoch and in which group: read from what members signed, the same for members and coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.secagg.graph import groups_of, neighbours, order
from common.secagg.keys import digest, number
from common.secagg.messages import Bundle, Nonce
from common.secagg.parameters import MOST_MEMBERS, Rules, Shape, shape_of
from common.secagg.parties import Record, verify
from common.secagg.refusal import SecAggError


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """The members of an epoch by rank, and what each put forward."""

    epoch: bytes
    bundles: tuple[Bundle, ...]
    names: tuple[str, ...]
    digest: bytes

    def rank(self, name: str) -> int:
        """A member's place.

        Raises:
            SecAggError: `roster`: it is no member.
        """
        if name not in self.names:
            raise SecAggError("roster")
        return self.names.index(name)


@dataclass(frozen=True, kw_only=True)
class Circle:
    """One group: the members whose masks cancel together.

    Attributes:
        index: Which group of the epoch.
        digest: Binds rules, epoch, every bundle, the beacon and the group; all keys depend on it.
        ring: Ranks in the order that the beacon gives.
        names: Names of the whole roster, by rank.
        shape: The group's numbers.
    """

    index: int
    digest: bytes
    ring: tuple[int, ...]
    names: tuple[str, ...]
    shape: Shape

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The group's ranks."""
        return tuple(sorted(self.ring))

    @cached_property
    def neighbours(self) -> dict[int, tuple[int, ...]]:
        """Each member's neighbours."""
        return neighbours(self.ring, self.shape.degree)

    @cached_property
    def places(self) -> dict[int, int]:
        """Each member's place among the group's ranks."""
        return {rank: place for place, rank in enumerate(self.ranks)}

    def isolated(self, ranks: Iterable[int]) -> set[int]:
        """Which of these members have too few neighbours among them; nobody in a complete graph."""
        among = set(ranks)
        if not self.shape.least_neighbours:
            return set()
        return {rank for rank in among if len(among.intersection(self.neighbours[rank])) < self.shape.least_neighbours}

    def connected(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The most of these members of whom everybody has neighbours enough among them, sorted."""
        among = set(ranks)
        while isolated := self.isolated(among):
            among -= isolated
        return tuple(sorted(among))


def check_bundle(bundle: Bundle, *, epoch: bytes, rules: Rules, records: Mapping[str, Record]) -> None:
    """Look at what a member put forward.

    Raises:
        SecAggError: `epoch` or `rules`: it is for others; `roster`: the name or its key is not pinned; `signature`.
    """
    if bundle.epoch != epoch:
        raise SecAggError("epoch")
    if bundle.rules != rules.digest:
        raise SecAggError("rules")
    record = records.get(bundle.name)
    if record is None or record.key_id != bundle.key_id:
        raise SecAggError("roster")
    verify(record, "bundle", bundle.body(), bundle.signature)


def check_keys(bundle: Bundle) -> None:
    """Try a member's keys: with some that are well-formed no secret can be agreed.

    Raises:
        SecAggError: `roster`.
    """
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bundle.x25519))
        MLKEM768PublicKey.from_public_bytes(bundle.ml_kem).encapsulate()
    except ValueError as e:
        raise SecAggError("roster") from e


def read_roster(
    bundles: tuple[bytes, ...], *, epoch: bytes, rules: Rules, records: Mapping[str, Record], known: bytes = b""
) -> Roster:
    """Read and check a roster.

    Args:
        bundles: Each a `Bundle`, sorted by name.
        epoch: Which epoch it has to be of.
        rules: The reader's own.
        records: All parties that the reader has pinned.
        known: Digest of the roster that was checked before; its signatures are not verified again.

    Raises:
        SecAggError: As `check_bundle`; or `roster`: names repeat or are not sorted, or there are too few.
    """
    if not max(rules.smallest_cohort, rules.fewest) <= len(bundles) <= MOST_MEMBERS - 1:
        raise SecAggError("roster")
    read = tuple(map(Bundle.from_bytes, bundles))
    names = tuple(bundle.name for bundle in read)
    if not all(a < b for a, b in pairwise(names)):
        raise SecAggError("roster")
    whole = digest("roster", epoch, *bundles)
    if whole != known:
        for bundle in read:
            check_bundle(bundle, epoch=epoch, rules=rules, records=records)
    return Roster(epoch=epoch, bundles=read, names=names, digest=whole)


def committed(epoch: bytes, name: str, nonce: bytes) -> bytes:
    """The commitment to a member's part of the beacon."""
    return digest("nonce", epoch, name.encode(), nonce)


def check_nonce(said: Nonce, *, roster: Roster, rank: int, records: Mapping[str, Record]) -> None:
    """Look at a revealed nonce.

    Raises:
        SecAggError: `roster`: the member saw another one; `beacon`: it is not what it committed to; `signature`.
    """
    bundle = roster.bundles[rank]
    if (said.epoch, said.roster) != (roster.epoch, roster.digest):
        raise SecAggError("roster")
    if committed(roster.epoch, bundle.name, said.nonce) != bundle.nonce:
        raise SecAggError("beacon")
    verify(records[bundle.name], "nonce", said.body(), said.signature)


def beacon_of(nonces: Mapping[int, bytes], *, roster: Roster, records: Mapping[str, Record]) -> bytes:
    """The randomness that all members drew together; nobody could know it before the roster stood.

    Args:
        nonces: A `Nonce` of every rank.
        roster: What they were revealed for.
        records: The pinned records.

    Raises:
        SecAggError: `beacon`: one is missing; or as `check_nonce`.
    """
    if len(nonces) != len(roster.names) or set(nonces) != set(range(len(roster.names))):
        raise SecAggError("beacon")
    read = [Nonce.from_bytes(nonces[rank]) for rank in range(len(roster.names))]
    for rank, said in enumerate(read):
        check_nonce(said, roster=roster, rank=rank, records=records)
    return digest("beacon", *(said.nonce for said in read))


def circles_of(roster: Roster, *, beacon: bytes, rules: Rules) -> tuple[Circle, ...]:
    """All groups of an epoch.

    Args:
        roster: The members.
        beacon: Empty where none is needed.
        rules: The run's.

    Raises:
        SecAggError: `roster` or `threshold`: a group is too small to be safe.
    """
    ranks = {name: rank for rank, name in enumerate(roster.names)}
    circles = []
    for index, names in enumerate(groups_of(roster.names, group_size=rules.group_size, beacon=beacon)):
        ring = order(names, beacon) if beacon else names
        whole = digest(
            "group",
            rules.digest,
            roster.epoch,
            roster.digest,
            beacon,
            number(index),
            *(name.encode() for name in names),
        )
        circles.append(
            Circle(
                index=index,
                digest=whole,
                ring=tuple(ranks[name] for name in ring),
                names=roster.names,
                shape=shape_of(len(names), rules=rules),
            )
        )
    return tuple(circles)
