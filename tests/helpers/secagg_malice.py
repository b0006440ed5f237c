"""A malicious coordinator of secure aggregation, with all that it and its colluders have, trying to read updates.

It is written here, not taken from the server: it speaks the protocol's messages as it likes, keeps whatever it is
given, and takes off every mask that it can compute a key for. The members are the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import combinations, islice

import numpy as np

from common.crypto import PartyRecord
from common.secagg import escrow
from common.secagg.keys import KEY_BYTES, digest, label
from common.secagg.masks import MaskKey, apply_masks
from common.secagg.member import Member
from common.secagg.member_state import SHARES_A_ROUND, Epoch, Saved
from common.secagg.messages import (
    Advertise,
    Agree,
    Burn,
    Certificate,
    Deposit,
    Deposited,
    Exchange,
    Inbox,
    Nonce,
    Offer,
    Offers,
    Released,
    Reveal,
    Statement,
    Train,
    Unmask,
)
from common.secagg.parameters import Shape, needs_beacon, shape_of
from common.secagg.refusal import SecAggError
from common.secagg.roster import Circle, circles_of, read_roster
from common.secagg.shamir import SHARE_BYTES, combine
from tests.helpers.secagg import MemoryJournal, Words, names_of, rules, site

SIZE = 512
CODEC = hashlib.sha256(b"codec").digest()
KINDS = (escrow.SELF, escrow.VAULT)


def base_of(model: str) -> bytes:
    """Digest of a model."""
    return hashlib.sha256(model.encode()).digest()


def refused(call: Callable[[], object]) -> str:
    """Why a step is refused; empty if it is not."""
    try:
        call()
    except SecAggError as e:
        return e.reason
    return ""


class Remembering:
    """A pinned record that verifies each signature once: hundreds of members in one process look at the same ones."""

    def __init__(self, record: PartyRecord) -> None:
        self.name, self.key_id = record.name, record.key_id
        self._record, self._seen = record, set[tuple[bytes, bytes, bytes]]()

    def verify(self, label: bytes, message: bytes, signature: bytes) -> None:
        """As `PartyRecord.verify`."""
        if (label, message, signature) not in self._seen:
            self._record.verify(label, message, signature)
            self._seen.add((label, message, signature))


class Malice:
    """Members, and a coordinator that knows all that passes through it and all that its colluders know.

    Attributes:
        members: By name; names are in the order of their ranks.
        colluders: Ranks of members that tell the coordinator everything.
        updates: What each member masked last, by rank: the truth, which the coordinator is after.
        masked: What it was sent, by (rank, index).
        shares: What it was given, by (kind, owner, index), then by holder.
    """

    def __init__(self, size: int, *, colluders: Iterable[int] = (), most_aborts: int = 20, **changes: object) -> None:
        self.rules = rules(**changes)
        self.names = names_of(size)
        self.peers = {name: Remembering(site(name).record) for name in self.names}
        self.journals = {name: MemoryJournal() for name in self.names}
        self.members = {name: self.member(name, most_aborts) for name in self.names}
        self.colluders = frozenset(colluders)
        self.updates: dict[int, Words] = {}
        self.masked: dict[tuple[int, int], Words] = {}
        self.headers: dict[tuple[int, int], bytes] = {}
        self.shares: dict[tuple[int, int, int], dict[int, bytes]] = {}
        self.deposits: dict[int, Deposited] = {}
        self.knows: dict[int, Epoch] = {}
        self.epoch = b""
        self.circles: tuple[Circle, ...] = ()
        self._found: dict[tuple[int, int, int], bytes | None] = {}
        self._last = 0

    def member(self, name: str, most_aborts: int = 20) -> Member:
        """A member with this name's identity and journal: a process that has just started."""
        return Member(
            name,
            signer=site(name),
            peers=self.peers,
            rules=self.rules,
            journal=self.journals[name],
            most_aborts=most_aborts,
        )

    def at(self, rank: int) -> Member:
        """The member of a rank."""
        return self.members[self.names[rank]]

    # Set-up, leg by leg: tests put in between what they like.

    def advertise(self, epoch: bytes) -> list[bytes]:
        """Everybody's bundle."""
        self.epoch = epoch
        asked = Advertise(epoch=epoch, rules=self.rules.digest).to_bytes()
        return [self.members[name].answer(asked) for name in self.names]

    def reveal(self, bundles: Sequence[bytes]) -> dict[int, bytes]:
        """Everybody's nonce, where a beacon is needed."""
        if not needs_beacon(self.rules, len(bundles)):
            return {}
        asked = Reveal(epoch=self.epoch, bundles=tuple(bundles)).to_bytes()
        return {rank: self.at(rank).answer(asked) for rank in range(len(bundles))}

    def exchange(self, bundles: Sequence[bytes], nonces: Mapping[int, bytes]) -> dict[int, Offers]:
        """Everybody's offers."""
        asked = Exchange(epoch=self.epoch, bundles=tuple(bundles), nonces=dict(nonces)).to_bytes()
        return {rank: Offers.from_bytes(self.at(rank).answer(asked)) for rank in range(len(bundles))}

    def deposit_one(self, rank: int, offers: Mapping[int, Offers]) -> None:
        """One member's vaults, commitments and sealed shares."""
        asked = Deposit(epoch=self.epoch, offers=self.offers_for(rank, offers)).to_bytes()
        self.deposits[rank] = Deposited.from_bytes(self.at(rank).answer(asked))

    def offers_for(self, receiver: int, offers: Mapping[int, Offers]) -> dict[int, bytes]:
        """What a member is handed in the last leg."""
        handed = {}
        for sender, said in offers.items():
            if receiver in said.ciphertexts:
                digests = {rank: hashlib.sha256(text).digest() for rank, text in said.ciphertexts.items()}
                handed[sender] = Offer(
                    digests=digests, ciphertext=said.ciphertexts[receiver], signature=said.signature
                ).to_bytes()
        return handed

    def hand(self, rank: int) -> None:
        """Hand a member its neighbours' shares; what is in them, only its channels open."""
        if rank in self.colluders:
            saved = Saved.from_bytes(self.at(rank).to_bytes())
            self.knows[rank] = next(e for e in map(Epoch.from_bytes, saved.epochs) if e.id == self.epoch)
        near = {j: said.shares[rank] for j, said in self.deposits.items() if rank in said.shares}
        self.at(rank).answer(Inbox(epoch=self.epoch, shares=near).to_bytes())

    def deposit(self, offers: Mapping[int, Offers]) -> None:
        """Everybody's vaults, commitments and sealed shares; and what colluders know from now on."""
        for rank in offers:
            self.deposit_one(rank, offers)
        for rank in offers:
            self.hand(rank)
        self._found = {}

    def set_up(self, epoch: bytes = b"e" * 16) -> Malice:
        """A whole epoch, as an honest coordinator does it."""
        bundles = self.advertise(epoch)
        nonces = self.reveal(bundles)
        self.deposit(self.exchange(bundles, nonces))
        roster = read_roster(tuple(bundles), epoch=epoch, rules=self.rules, records=self.peers)
        read = [Nonce.from_bytes(nonces[rank]).nonce for rank in sorted(nonces)]
        beacon = digest("beacon", *read) if read else b""
        self.circles = circles_of(roster, beacon=beacon, rules=self.rules)
        return self

    @property
    def circle(self) -> Circle:
        """The one group, where there is one."""
        (circle,) = self.circles
        return circle

    @property
    def shape(self) -> Shape:
        """The numbers of the one group."""
        return shape_of(len(self.names), rules=self.rules)

    @property
    def everybody(self) -> tuple[int, ...]:
        """All ranks."""
        return tuple(range(len(self.names)))

    # A round.

    def next_index(self) -> int:
        """An index that nobody used yet."""
        self._last += 1
        return self._last

    def train(
        self,
        rank: int,
        index: int,
        participants: Iterable[int] | None = None,
        *,
        model: str | None = None,
        certificates: Sequence[bytes] = (),
        server_round: int = 1,
        update: Words | None = None,
        codec: bytes = CODEC,
    ) -> Words:
        """Have a member mask an update; the coordinator keeps the result."""
        asked = tuple(sorted(self.everybody if participants is None else participants))
        train = Train(epoch=self.epoch, index=index, participants=asked, certificates=tuple(certificates))
        base = base_of(model or f"model {index}")
        mask = self.at(rank).begin(train.to_bytes(), server_round=server_round, base=base, codec=codec)
        if update is None:
            update = np.random.default_rng([rank, index]).integers(0, 1 << 20, SIZE, dtype=np.uint32)
        vector = update.copy()
        mask.apply(vector)
        self.updates[rank], self.masked[rank, index], self.headers[rank, index] = update, vector, mask.header
        return vector

    def state(self, rank: int, index: int, survivors: Iterable[int]) -> Statement:
        """Have a member state a survivor set."""
        asked = Agree(epoch=self.epoch, index=index, survivors=tuple(sorted(survivors)))
        return Statement.from_bytes(self.at(rank).answer(asked.to_bytes()))

    def forge(self, rank: int, header: bytes, survivors: Iterable[int]) -> Statement:
        """A colluder's statement: it signs whatever it is asked to, as often as it is asked to."""
        assert rank in self.colluders
        said = Statement(header=header, survivors=tuple(sorted(survivors)), signature=b"")
        signature = site(self.names[rank]).sign(label("statement"), said.body())
        return Statement(header=said.header, survivors=said.survivors, signature=signature)

    def burnt(self, rank: int, header: bytes) -> Statement:
        """Have a member state that a round is burnt."""
        return Statement.from_bytes(self.at(rank).answer(Burn(header=header).to_bytes()))

    def certificate(self, statements: Mapping[int, Statement]) -> bytes:
        """What shows that a round was burnt, if they are enough."""
        header = next(iter(statements.values())).header
        signatures = {self.names[rank]: said.signature for rank, said in statements.items()}
        return Certificate(header=header, signatures=signatures).to_bytes()

    def unmask(self, rank: int, index: int, survivors: Iterable[int], statements: Mapping[int, Statement]) -> None:
        """Have a member release shares, and keep them."""
        alive = tuple(sorted(survivors))
        signatures = {signer: said.signature for signer, said in statements.items()}
        asked = Unmask(epoch=self.epoch, index=index, survivors=alive, signatures=signatures)
        for j, share in Released.from_bytes(self.at(rank).answer(asked.to_bytes())).shares.items():
            kind = escrow.SELF if j in alive else escrow.VAULT
            self.shares.setdefault((kind, j, index), {})[rank] = share
            self._found.pop((kind, j, index), None)

    def open_round(self, index: int, survivors: Iterable[int]) -> None:
        """Everybody agrees and releases, as asked by an honest coordinator."""
        alive = tuple(sorted(survivors))
        said = {rank: self.state(rank, index, alive) for rank in alive}
        for rank in alive:
            self.unmask(rank, index, alive, said)

    def open_round_by_force(self, index: int, survivors: Iterable[int]) -> None:
        """Ask everybody, use whatever statements there are for each header, and keep what is released."""
        alive = tuple(sorted(survivors))
        said: dict[int, Statement] = {}
        for rank in alive:
            with suppress(SecAggError):
                said[rank] = self.state(rank, index, alive)
        for rank in alive:
            same = {other: one for other, one in said.items() if one.header == self.headers[rank, index]}
            with suppress(SecAggError):
                self.unmask(rank, index, alive, same)

    # What all that amounts to.

    def pool(self, kind: int, owner: int, index: int) -> dict[int, bytes]:
        """All shares of a secret that were given, and those that colluders hold, by place."""
        places = {holder: place for place, holder in enumerate(self._near(owner), 1)}
        pool = {places[holder]: share for holder, share in self.shares.get((kind, owner, index), {}).items()}
        at = SHARES_A_ROUND * (index - 1) + SHARE_BYTES * kind
        for holder, knows in self.knows.items():
            if holder in places and holder in self.deposits[owner].shares:
                opened = escrow.open_shares(
                    knows.channels[owner],
                    self.deposits[owner].shares[holder],
                    group=self._group(owner),
                    sender=owner,
                    receiver=holder,
                )
                assert opened is not None
                pool[places[holder]] = opened[at : at + SHARE_BYTES]
        return pool

    def secret(self, kind: int, owner: int, index: int, *, tries: int = 50) -> bytes | None:
        """A member's secret, if anything that can be made of the shares fits its commitment.

        It tries many subsets of each size up to the threshold, as if the size were the threshold.
        """
        if owner in self.colluders:
            return self._own(kind, owner, index)
        pool = self.pool(kind, owner, index)
        wanted = self.deposits[owner].commitments[2 * (index - 1) + kind]
        for size in range(min(len(pool), self._threshold(owner)), 0, -1):
            for places in islice(combinations(sorted(pool), size), tries):
                try:
                    found = combine({place: pool[place] for place in places}, threshold=size)
                except SecAggError:
                    continue  # no 32 bytes come out of it
                if escrow.commitment(self._group(owner), owner, index, kind, found) == wanted:
                    return found
        return None

    def pair_key(self, i: int, j: int, index: int) -> bytes | None:
        """k_ij,r: from a colluder, or out of a vault that opens."""
        at = KEY_BYTES * (index - 1)
        for one, other in ((i, j), (j, i)):
            if one in self.knows:
                return self.knows[one].pair_keys[other][at : at + KEY_BYTES]
            kappa = self._once(escrow.VAULT, one, index)
            if kappa is not None:
                deposit = self.deposits[one]
                opened = escrow.open_vault(
                    kappa,
                    deposit.vaults[index - 1],
                    group=self._group(one),
                    rank=one,
                    index=index,
                    neighbours=sorted(deposit.shares),
                )
                return opened[other]
        return None

    def peel(self, victims: Iterable[int], index: int, *, participants: Iterable[int] | None = None) -> Words:
        """The sum of victims' vectors without every mask whose key can be found; masks among victims cancel."""
        chosen, total, keys = set(victims), np.zeros(SIZE, np.uint32), []
        asked = set(self.everybody if participants is None else participants)
        for i in chosen:
            total += self.masked[i, index]
            header = self.headers[i, index]
            b = self._once(escrow.SELF, i, index)
            if b is not None:
                keys.append(MaskKey(escrow.self_mask_key(b, header), -1))
            for j in set(self._near(i)) & asked:
                if j in chosen and self.headers.get((j, index)) == header:
                    continue
                pair = self.pair_key(i, j, index)
                if pair is not None:
                    keys.append(MaskKey(escrow.pair_mask_key(pair, header), -1 if i < j else 1))
        apply_masks(total, keys)
        return total

    def truth(self, victims: Iterable[int]) -> Words:
        """What the coordinator would like to see."""
        return np.sum([self.updates[i] for i in victims], axis=0, dtype=np.uint32)

    def _once(self, kind: int, owner: int, index: int) -> bytes | None:
        if (kind, owner, index) not in self._found:
            self._found[kind, owner, index] = self.secret(kind, owner, index)
        return self._found[kind, owner, index]

    def _own(self, kind: int, owner: int, index: int) -> bytes | None:
        """A colluder's b; its kappa is not needed, as it tells its pair keys."""
        at = KEY_BYTES * (index - 1)
        return self.knows[owner].self_keys[at : at + KEY_BYTES] if kind == escrow.SELF else None

    def _circle_of(self, rank: int) -> Circle:
        return next(circle for circle in self.circles if rank in circle.ring)

    def _near(self, rank: int) -> tuple[int, ...]:
        return self._circle_of(rank).neighbours[rank]

    def _group(self, rank: int) -> bytes:
        return self._circle_of(rank).digest

    def _threshold(self, rank: int) -> int:
        return self._circle_of(rank).shape.threshold


@cache
def shared_ring() -> Malice:
    """A ring of 130 members without colluders, set up once; each test takes the next index."""
    return Malice(130, epoch_rounds=8).set_up()


def looks_random(vector: Words) -> bool:
    """Whether half of a vector's bits are ones, within 6.5 standard deviations: wrongly denied once in 10^10 times."""
    ones = int(np.unpackbits(vector.view(np.uint8)).sum())
    return abs(ones - 16 * vector.size) < 6.5 * np.sqrt(8 * vector.size)
