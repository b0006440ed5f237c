"""Many members and a coordinator in one process, with a clock on each end and a scale on what travels.

Members, coordinator, keys, codec and journals are the real ones; only the network is missing. Clocks are on a sample of
the members. The others share what they find of a signature, so that a crowd is done in minutes; those that are measured
verify every signature themselves.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import numpy as np

from client.secagg.journal import FileJournal
from common.crypto import PartyKeys, PartyRecord
from common.secagg import Group, Mask, Member, Record, Round, Rules, Setup
from common.secagg.fixed_point import FixedPoint
from common.secagg.packing import pack

NORM, EPOCH_ROUNDS = 16.0, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A party's record that verifies a signature once for all members in this process that were not chosen."""

    record: PartyRecord
    right: set[tuple[bytes, bytes, bytes]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The party's name."""
        return self.record.name

    @property
    def key_id(self) -> bytes:
        """Digest of the whole record."""
        return self.record.key_id

    def verify(self, label: bytes, message: bytes, signature: bytes) -> None:
        """As the record, but for what was right before."""
        if (label, message, signature) not in self.right:
            self.record.verify(label, message, signature)
            self.right.add((label, message, signature))


class Crowd:
    """A federation's secure aggregation, over one epoch.

    Attributes:
        measured: Members whose time and bytes are counted.
        seconds: CPU time by what was done; members' is of all measured ones together.
        sent: Bytes that measured members sent, by what was done.
        received: Bytes that they received.
    """

    def __init__(self, folder: Path, *, count: int, colluding: int, values: int, every: int = 1) -> None:
        """Make the parties.

        Args:
            folder: For the members' journals.
            count: Members.
            colluding: How many of them are assumed to collude.
            values: Entries of an update.
            every: One of so many members is measured.
        """
        self._rules = Rules(
            run_id=bytes(16),
            config_digest=bytes(32),
            epoch_rounds=EPOCH_ROUNDS,
            honest=2,
            colluding=colluding,
            min_survivors=2,
            smallest_cohort=3,
            group_size=0,
            bits=32,
        )
        self._codec = FixedPoint(bits=32, dimensions=values, clipping_norm=NORM, most_weight=1, clients=count)
        keys = {name: PartyKeys.generate(name, "site") for name in (f"site-{i:04d}" for i in range(count))}
        self.measured = frozenset(list(keys)[::every])
        self._records = {name: own.record for name, own in keys.items()}
        shared = {name: Shared(record=record) for name, record in self._records.items()}
        self._members = {
            name: self._member(own, self._records if name in self.measured else shared, folder)
            for name, own in keys.items()
        }
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def set_up(self) -> Group:
        """An epoch of all members."""
        setup = Setup(self._rules, records=self._records, names=list(self._members))
        while setup.leg is not None:
            for name, request in setup.requests().items():
                setup.receive(name, self._answer("set-up", name, request))
            setup.advance()
        (group,) = setup.groups()
        return group

    def round(self, group: Group, *, server_round: int, dropped: Collection[str]) -> None:
        """A whole round, in which the dropped ones are asked but send nothing; its mean is compared with the truth.

        Raises:
            RuntimeError: The mean is not that of the survivors' updates, within the codec's bound.
        """
        base, digest = server_round.to_bytes(32, "big"), self._codec.digest
        opened = group.begin(
            server_round=server_round, base=base, codec=digest, size=self._codec.size, participants=group.names
        )
        truth = np.zeros(self._codec.dimensions)
        for name, request in opened.requests().items():
            with self._clock("begin", name):
                mask = self._members[name].begin(request, server_round=server_round, base=base, codec=digest)
            self._weigh("begin", name, request, b"")
            if name not in dropped:
                truth += self._upload(opened, name, mask)
        self._agree(opened)
        with self._clock("unmasking"):
            total = opened.result()
        survivors = len(opened.survivors)
        off = float(np.abs(self._codec.decode(total, survivors).update - truth / survivors).max())
        if survivors != len(group.names) - len(dropped) or off > self._codec.bound(survivors, survivors):
            raise RuntimeError(f"the mean of {survivors} updates is off by {off}")

    def _upload(self, opened: Round, name: str, mask: Mask) -> np.ndarray:
        """One member's update, masked and added up; the update."""
        update = np.random.default_rng(len(name)).uniform(-1, 1, self._codec.dimensions)
        update *= 0.9 * NORM / np.linalg.norm(update)
        with self._clock("encode", name):
            vector = self._codec.encode(update, weight=1.0, metrics={}, seed=os.urandom(32))
        with self._clock("mask", name):
            mask.apply(vector)
            packed = pack(vector, self._rules.bits)
        self._weigh("mask", name, b"", packed)
        opened.add(name, packed)
        return update

    def _agree(self, opened: Round) -> None:
        """The survivors state who they are, and release their shares."""
        with self._clock("unmasking"):
            request = opened.agree()
        for name in opened.survivors:
            reply = self._answer("agree", name, request)
            with self._clock("unmasking"):
                opened.stated(name, reply)
        with self._clock("unmasking"):
            request = opened.unmask()
        for name in opened.signers:
            reply = self._answer("unmask", name, request)
            with self._clock("unmasking"):
                opened.shares(name, reply)

    def _answer(self, what: str, name: str, request: bytes) -> bytes:
        with self._clock(what, name):
            reply = self._members[name].answer(request)
        self._weigh(what, name, request, reply)
        return reply

    def _weigh(self, what: str, name: str, request: Collection[object], reply: Collection[object]) -> None:
        if name in self.measured:
            self.received[what] += len(request)
            self.sent[what] += len(reply)

    @contextmanager
    def _clock(self, what: str, name: str | None = None) -> Iterator[None]:
        """CPU time of the coordinator, or of a member that is measured."""
        begin = process_time()
        yield
        if name is None or name in self.measured:
            self.seconds[what] += process_time() - begin

    def _member(self, own: PartyKeys, peers: Mapping[str, Record], folder: Path) -> Member:
        # A journal waits for the disk, which costs no CPU time.
        journal = FileJournal(folder / own.record.name, self._rules.run_id, durable=False)
        return Member(own.record.name, signer=own, peers=peers, rules=self._rules, journal=journal)
