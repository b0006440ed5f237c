"""The coordinator's end of an epoch's set-up. It checks what it passes on: a bad member costs only itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

from common.secagg.coordinator import Group
from common.secagg.graph import encapsulates
from common.secagg.keys import KEY_BYTES, digest
from common.secagg.member_state import SHARES_A_ROUND
from common.secagg.messages import (
    Advertise,
    Bundle,
    Deposit,
    Deposited,
    Exchange,
    Inbox,
    Nonce,
    Offer,
    Offers,
    Ready,
    Reveal,
    offered,
)
from common.secagg.parameters import Rules, needs_beacon, shape_of
from common.secagg.parties import Record, verify
from common.secagg.refusal import SecAggError
from common.secagg.roster import (
    Circle,
    Roster,
    beacon_of,
    check_bundle,
    check_keys,
    check_nonce,
    circles_of,
    read_roster,
)

_TAG_BYTES = 16


class Setup:
    """An epoch's set-up: for each leg `requests`, `receive` the answers, then `advance`; at the end `groups`.

    Args:
        rules: The run's.
        records: The pinned records of all sites.
        names: Who is invited.

    Attributes:
        epoch: 16 random bytes.
        leg: "advertise", "reveal", "exchange", "deposit" or "inbox"; None once it is over.
    """

    def __init__(self, rules: Rules, *, records: Mapping[str, Record], names: Sequence[str]) -> None:
        self.epoch = os.urandom(16)
        self.leg: str | None = "advertise"
        self._rules, self._records = rules, records
        first = Advertise(epoch=self.epoch, rules=rules.digest).to_bytes()
        self._requests = dict.fromkeys(sorted(names), first)
        self._replies: dict[str, bytes] = {}
        self._roster: Roster
        self._circles: dict[int, Circle] = {}
        self._offers: dict[int, Offers] = {}
        self._deposits: dict[int, Deposited] = {}
        self._ready: set[int] = set()

    def requests(self) -> dict[str, bytes]:
        """What is to be asked in this leg, by member, of those who have not answered."""
        return {name: request for name, request in self._requests.items() if name not in self._replies}

    def receive(self, name: str, reply: bytes) -> None:
        """Take an answer of this leg.

        Raises:
            SecAggError: It is refused, and its member is out of this epoch.
        """
        if self.leg is None or name not in self._requests:
            raise SecAggError("epoch")
        if self._replies.get(name) == reply:
            return
        looks: dict[str, Callable[[str, bytes], None]] = {
            "advertise": self._advertised,
            "reveal": self._revealed,
            "exchange": self._exchanged,
            "deposit": self._deposited,
            "inbox": self._received,
        }
        try:
            if name in self._replies:
                raise SecAggError("signature", "a member answered one request in two ways")
            looks[self.leg](name, reply)
        except SecAggError:
            self._requests.pop(name)
            self._replies.pop(name, None)
            raise
        self._replies[name] = reply

    def advance(self) -> None:
        """Close the leg: who has not answered is out.

        Raises:
            SecAggError: `beacon`: a nonce was not revealed; `roster`, `threshold`: too few are left. The epoch is over.
        """
        leg, self.leg = self.leg, None  # over, unless the next leg can be asked
        if leg == "advertise":
            self._after_advertise()
        elif leg == "reveal":
            if len(self._replies) < len(self._roster.names):
                raise SecAggError("beacon")
            self._ask_exchange({self._roster.rank(name): reply for name, reply in self._replies.items()})
        elif leg == "exchange":
            self._after_exchange()
        elif leg == "deposit":
            self._after_deposit()
        elif leg == "inbox":
            self._ready = {self._roster.rank(name) for name in self._replies}
            self._requests, self._replies = {}, {}
        else:
            raise SecAggError("epoch")

    def groups(self) -> list[Group]:
        """The groups in which enough members are ready to begin a round, after the last leg.

        Raises:
            SecAggError: `epoch`: the set-up is not over.
        """
        if self.leg is not None:
            raise SecAggError("epoch")
        circles = {circle.index: circle for circle in self._circles.values()}
        groups = []
        for _, circle in sorted(circles.items()):
            deposits = {rank: self._deposits[rank] for rank in circle.ranks if rank in self._ready}
            if len(circle.connected(deposits)) >= circle.shape.fewest:
                groups.append(Group(circle, deposits, epoch=self.epoch, rules=self._rules, records=self._records))
        return groups

    def _ask(self, leg: str, requests: Mapping[str, bytes]) -> None:
        self.leg, self._requests, self._replies = leg, dict(requests), {}

    def _after_advertise(self) -> None:
        bundles = tuple(self._replies[name] for name in sorted(self._replies))
        known = digest("roster", self.epoch, *bundles)  # each was checked when it came
        self._roster = read_roster(bundles, epoch=self.epoch, rules=self._rules, records=self._records, known=known)
        if not needs_beacon(self._rules, len(bundles)):
            self._ask_exchange({})
            return
        if not self._rules.group_size:
            shape_of(len(bundles), rules=self._rules)  # before anybody reveals anything
        request = Reveal(epoch=self.epoch, bundles=bundles).to_bytes()
        self._ask("reveal", dict.fromkeys(self._roster.names, request))

    def _ask_exchange(self, nonces: dict[int, bytes]) -> None:
        roster = self._roster
        beacon = beacon_of(nonces, roster=roster, records=self._records) if nonces else b""
        circles = circles_of(roster, beacon=beacon, rules=self._rules)
        self._circles = {rank: circle for circle in circles for rank in circle.ring}
        bundles = tuple(bundle.to_bytes() for bundle in roster.bundles)
        request = Exchange(epoch=self.epoch, bundles=bundles, nonces=nonces).to_bytes()
        self._ask("exchange", dict.fromkeys(roster.names, request))

    def _after_exchange(self) -> None:
        requests = {}
        for name in self._replies:
            rank = self._roster.rank(name)
            offers = {j: self._offer(j, rank) for j in self._senders(rank)}
            requests[name] = Deposit(epoch=self.epoch, offers=offers).to_bytes()
        if not requests:
            raise SecAggError("roster")
        self._ask("deposit", requests)

    def _after_deposit(self) -> None:
        requests = {}
        for name in self._replies:
            rank = self._roster.rank(name)
            near = self._circles[rank].neighbours[rank]
            shares = {j: self._deposits[j].shares[rank] for j in near if rank in self._shares(j)}
            requests[name] = Inbox(epoch=self.epoch, shares=shares).to_bytes()
        if not requests:
            raise SecAggError("roster")
        self._ask("inbox", requests)

    def _shares(self, sender: int) -> Mapping[int, bytes]:
        """What a member sealed for its neighbours; nothing if it did not come so far."""
        return self._deposits[sender].shares if sender in self._deposits else {}

    def _offer(self, sender: int, receiver: int) -> bytes:
        made = self._offers[sender]
        digests = {j: hashlib.sha256(ciphertext).digest() for j, ciphertext in made.ciphertexts.items()}
        return Offer(digests=digests, ciphertext=made.ciphertexts[receiver], signature=made.signature).to_bytes()

    def _advertised(self, name: str, reply: bytes) -> None:
        bundle = Bundle.from_bytes(reply)
        if bundle.name != name:
            raise SecAggError("roster")
        check_bundle(bundle, epoch=self.epoch, rules=self._rules, records=self._records)
        check_keys(bundle)

    def _revealed(self, name: str, reply: bytes) -> None:
        rank = self._roster.rank(name)
        check_nonce(Nonce.from_bytes(reply), roster=self._roster, rank=rank, records=self._records)

    def _exchanged(self, name: str, reply: bytes) -> None:
        offers, rank = Offers.from_bytes(reply), self._roster.rank(name)
        if (offers.epoch, offers.group) != (self.epoch, self._circles[rank].digest):
            raise SecAggError("roster")
        if offers.ciphertexts.keys() != self._receivers(rank):
            raise SecAggError("format")
        digests = {j: hashlib.sha256(ciphertext).digest() for j, ciphertext in offers.ciphertexts.items()}
        verify(self._records[name], "offers", offered(offers.group, name, digests), offers.signature)
        self._offers[rank] = offers

    def _deposited(self, name: str, reply: bytes) -> None:
        deposited, rank = Deposited.from_bytes(reply), self._roster.rank(name)
        if (deposited.epoch, deposited.group) != (self.epoch, self._circles[rank].digest):
            raise SecAggError("roster")
        rounds, pairs = self._rules.epoch_rounds, self._receivers(rank) | self._senders(rank)
        sizes = {len(vault) for vault in deposited.vaults} == {KEY_BYTES * len(pairs) + _TAG_BYTES} and {
            len(sealed) for sealed in deposited.shares.values()
        } == {SHARES_A_ROUND * rounds + _TAG_BYTES}
        counts = len(deposited.vaults), len(deposited.commitments)
        if not sizes or counts != (rounds, 2 * rounds) or deposited.shares.keys() != pairs:
            raise SecAggError("format")
        verify(self._records[name], "deposited", deposited.body(), deposited.signature)
        self._deposits[rank] = deposited

    def _received(self, _name: str, reply: bytes) -> None:
        if Ready.from_bytes(reply).epoch != self.epoch:
            raise SecAggError("epoch")

    def _receivers(self, rank: int) -> set[int]:
        """To whom a member encapsulates a key."""
        circle, places = self._circles[rank], self._circles[rank].places
        size = len(circle.ring)
        return {j for j in circle.neighbours[rank] if encapsulates(places[rank], places[j], size)}

    def _senders(self, rank: int) -> set[int]:
        """Whose ciphertexts a member gets."""
        return {
            j for j in self._circles[rank].neighbours[rank] if j in self._offers and rank in self._offers[j].ciphertexts
        }
