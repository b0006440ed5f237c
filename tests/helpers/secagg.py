"""A federation in one process that runs secure aggregation: real keys, real messages, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.crypto import PartyKeys, PartyRecord
from common.secagg import Group, Mask, Member, Round, Rules, SecAggError, Setup, Use, kind_of
from common.secagg.member_state import Epoch
from common.secagg.packing import pack

CODEC = b"codec"
FIRST = "site-0000"
"""The member that tests look at most."""
Words = NDArray[np.uint32]


@lru_cache(maxsize=2048)
def site(name: str) -> PartyKeys:
    """A site's identity, made once a test process."""
    return PartyKeys.generate(name, "site")


def names_of(count: int) -> tuple[str, ...]:
    """Names of sites, sorted."""
    return tuple(f"site-{i:04d}" for i in range(count))


def rules(**changes: object) -> Rules:
    """Rules for small tests: epochs of 4 rounds, 2 honest members at least, 1 colluding."""
    usual: dict[str, object] = {
        "run_id": bytes(16),
        "config_digest": bytes(32),
        "epoch_rounds": 4,
        "honest": 2,
        "colluding": 1,
        "min_survivors": 2,
        "smallest_cohort": 3,
        "group_size": 0,
        "bits": 32,
    }
    return Rules(**(usual | changes))  # type: ignore[arg-type]


class MemoryJournal:
    """A journal that lasts as long as its test."""

    def __init__(self) -> None:
        self.written: list[Use] = []
        self.statements: dict[bytes, bytes] = {}
        self.aborts = 0

    def use(self, use: Use) -> None:
        self.written.append(use)

    def find(self, header: bytes) -> Use | None:
        return next((use for use in self.written if use.header == header), None)

    def uses(self, base: bytes) -> Sequence[Use]:
        return [use for use in self.written if use.base == base]

    def last_index(self, epoch: bytes) -> int:
        return max((use.index for use in self.written if use.epoch == epoch), default=0)

    def state(self, header: bytes, statement: bytes) -> None:
        if header in self.statements:
            raise AssertionError("a member made two statements about one round")
        self.statements[header] = statement

    def stated(self, header: bytes) -> bytes | None:
        return self.statements.get(header)

    def aborted(self) -> None:
        self.aborts += 1

    def aborts_today(self) -> int:
        return self.aborts


class Federation:
    """All members, and a coordinator that follows the protocol unless a test says otherwise.

    Attributes:
        members: By name. A member that a test removes has vanished for good.
        journals: By name; they outlive a member.
    """

    def __init__(self, count: int, *, names: Sequence[str] = (), **changes: object) -> None:
        self.rules = rules(**changes)
        self.names = tuple(names) or names_of(count)
        self.records: dict[str, PartyRecord] = {name: site(name).record for name in self.names}
        self.journals = {name: MemoryJournal() for name in self.names}
        self.members = {name: self.member(name) for name in self.names}
        self.server_round = 0

    def member(self, name: str) -> Member:
        """A new member with the journal of its name: a process that has just started."""
        return Member(name, signer=site(name), peers=self.records, rules=self.rules, journal=self.journals[name])

    def restore(self, name: str) -> None:
        """Save a member, end it, and read it back."""
        self.members[name] = Member.from_bytes(
            self.members[name].to_bytes(),
            signer=site(name),
            peers=self.records,
            rules=self.rules,
            journal=self.journals[name],
        )

    def ask(self, requests: Mapping[str, bytes], *, absent: Iterable[str] = ()) -> dict[str, bytes]:
        """Answers of all members that are there; who refuses is missing from them."""
        replies, gone = {}, set(absent)
        for name, request in requests.items():
            if name in self.members and name not in gone:
                try:
                    replies[name] = self.members[name].answer(request)
                except SecAggError:
                    continue
        return replies

    def set_up(
        self,
        *,
        absent: Mapping[str, Iterable[str]] | None = None,
        names: Sequence[str] = (),
        after: Callable[[Setup], None] | None = None,
    ) -> list[Group]:
        """Set up an epoch; `absent` says by leg who does not answer, `after` is called after each leg."""
        setup = Setup(self.rules, records=self.records, names=names or self.names)
        while setup.leg is not None:
            for name, reply in self.ask(setup.requests(), absent=(absent or {}).get(setup.leg, ())).items():
                setup.receive(name, reply)
            setup.advance()
            if after is not None:
                after(setup)
        return setup.groups()

    def begin(
        self, group: Group, *, base: bytes, size: int, participants: Iterable[str] = (), burnt: Sequence[bytes] = ()
    ) -> Round:
        """The coordinator's round; the members know nothing of it yet."""
        self.server_round += 1
        return group.begin(
            server_round=self.server_round,
            base=base,
            codec=CODEC,
            size=size,
            participants=tuple(participants) or tuple(group.live),
            burnt=burnt,
        )

    def masks(self, opened: Round, *, base: bytes, absent: Iterable[str] = ()) -> dict[str, Mask]:
        """What members mask with; who refuses or is absent is missing."""
        masks, gone = {}, set(absent)
        for name, request in opened.requests().items():
            if name in self.members and name not in gone:
                try:
                    masks[name] = self.members[name].begin(
                        request, server_round=self.server_round, base=base, codec=CODEC
                    )
                except SecAggError:
                    continue
        return masks

    def upload(self, opened: Round, masks: Mapping[str, Mask], vectors: Mapping[str, Words]) -> None:
        """Mask a copy of each vector, and add it."""
        for name, mask in masks.items():
            vector = vectors[name].copy()
            mask.apply(vector)
            opened.add(name, pack(vector, self.rules.bits))

    def state(self, opened: Round, *, absent: Iterable[str] = ()) -> None:
        """Have the survivors agreed on."""
        for name, reply in self.ask(dict.fromkeys(opened.survivors, opened.agree()), absent=absent).items():
            opened.stated(name, reply)

    def release(self, opened: Round, *, absent: Iterable[str] = ()) -> None:
        """Collect the shares."""
        for name, reply in self.ask(dict.fromkeys(opened.signers, opened.unmask()), absent=absent).items():
            opened.shares(name, reply)

    def round(
        self,
        group: Group,
        vectors: Mapping[str, Words],
        *,
        base: bytes,
        absent: Mapping[str, Iterable[str]] | None = None,
        burnt: Sequence[bytes] = (),
    ) -> tuple[Words, tuple[str, ...]]:
        """A whole round; `absent` says by step (train, agree, unmask) who vanishes. The sum, and who is in it."""
        gone = absent or {}
        size = len(next(iter(vectors.values())))
        opened = self.begin(group, base=base, size=size, burnt=burnt)
        masks = self.masks(opened, base=base, absent=gone.get("train", ()))
        self.upload(opened, masks, vectors)
        self.state(opened, absent=gone.get("agree", ()))
        self.release(opened, absent=gone.get("unmask", ()))
        return opened.result(), opened.survivors

    def burn(self, opened: Round) -> bytes:
        """Give a round up; the certificate."""
        burning = opened.burning()
        for name, reply in self.ask(dict.fromkeys(opened.participants, burning.request())).items():
            burning.stated(name, reply)
        return burning.certificate()


def vectors_of(names: Iterable[str], size: int, *, bits: int = 32, seed: int = 0) -> dict[str, Words]:
    """Plain vectors over the whole ring."""
    generator = np.random.default_rng(seed)
    return {name: generator.integers(0, 1 << bits, size, dtype=np.uint32) for name in names}


def total(vectors: Mapping[str, Words], names: Iterable[str], *, bits: int = 32) -> Words:
    """The sum mod 2^bits that masked vectors have to give."""
    added = np.zeros_like(next(iter(vectors.values())))
    for name in names:
        added += vectors[name]
    return added & np.uint32((1 << bits) - 1)


def refusal(federation: Federation, message: bytes, *, name: str = FIRST) -> str:
    """Why a member refuses a message; it must change nothing, neither in its state nor in its journal."""
    member, journal = federation.members[name], federation.journals[name]
    before = member.to_bytes(), list(journal.written), dict(journal.statements), journal.aborts
    try:
        if kind_of(message) == "train":
            member.begin(message, server_round=federation.server_round, base=b"b", codec=CODEC)
        else:
            member.answer(message)
    except SecAggError as e:
        reason = e.reason
    else:
        raise AssertionError("a member took what it has to refuse")
    assert (member.to_bytes(), journal.written, journal.statements, journal.aborts) == before
    return reason


def until(federation: Federation, leg: str) -> tuple[Setup, bytes]:
    """A set-up at the beginning of a leg, and what the first member is asked in it."""
    setup = Setup(federation.rules, records=federation.records, names=federation.names)
    while setup.leg != leg:
        for name, reply in federation.ask(setup.requests()).items():
            setup.receive(name, reply)
        setup.advance()
    return setup, setup.requests()[FIRST]


def epoch_of(federation: Federation, name: str = FIRST) -> Epoch:
    """The newest epoch of a member, looked at from inside."""
    return list(federation.members[name]._epochs.values())[-1]
