"""Epochs over the rounds of a run, and rounds that have to be given up.

An epoch's roster is the cohort that its keys were set up with. A new one begins where the last is used up, where a
group has too few members left, where the cohort is another one, and where a sum was left out: who is in a group with
whom is then drawn anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from common.crypto import PartyRecord
from common.errors import FailureCode
from common.flower import COHORT
from common.secagg import Burning, Group, Round, Rules, SecAggError
from common.secagg.fixed_point import Codec
from server.asking.base import Call
from server.secagg.headers import Begun, Headers
from server.secagg.set_up import SetUp
from server.secagg.steps import Step, hear, steps_alone
from server.secagg.sums import Sum

log = structlog.get_logger()

_TRIES: Final = 2
"""How often a round may set up keys: once more, where the first set-up was spoilt by somebody who is then left out."""

_MOST_WITHHELD: Final = 2
"""How many set-ups one client may spoil by not revealing its nonce, before it is left out of the rest of the run."""

_RIDE_ROUNDS: Final = 2
"""Over so many rounds the next set-up is spread: it has four steps, or five, and a round three trips."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beginning:
    """How a round begins.

    Attributes:
        sums: One for every group that can have one.
        out: Why members of the cohort are in none.
        epoch: Number of the epoch.
        setup: Whether keys were set up for this round.
        riding: The next epoch's set-up, which goes with this round's messages.
    """

    sums: list[Sum]
    out: dict[str, FailureCode]
    epoch: int
    setup: bool
    riding: SetUp


class Session:
    """The coordinator's end of secure aggregation in one run.

    Guarantee: every round is written down before anybody is asked. After a restart keys are set up anew, and rounds
    that were never opened are known.
    """

    def __init__(
        self, rules: Rules, *, records: Mapping[str, PartyRecord], folder: Path | None, rounds: int, fixed_cohort: bool
    ) -> None:
        """Open.

        Args:
            rules: The run's.
            records: Pinned records of the sites, by name.
            folder: The run's, or None.
            rounds: Of the run.
            fixed_cohort: Whether everybody is asked every round, so that the next epoch's roster is known beforehand.
        """
        self._rules, self._records = rules, records
        self._rounds, self._fixed = rounds, fixed_cohort
        self._headers = Headers(folder)
        self._groups: list[Group] = []
        self._failures: dict[str, FailureCode] = {}
        self._cohort: frozenset[str] = frozenset()
        self._next = SetUp.nothing()
        self._withheld: Counter[str] = Counter()
        self._epoch = self._headers.epoch

    def begin(self, call: Call, *, base: bytes, codec: Callable[[int], Codec]) -> Beginning:
        """Begin a round in every group, in a new epoch if need be.

        Args:
            call: The round.
            base: Digest of its model.
            codec: Of so many participants.

        Raises:
            RunError: The run's folder cannot be written. Nobody was asked.
        """
        before, sums = self._epoch, None
        if self._groups and self._cohort == frozenset(call.cohort):
            sums = self._begin(call, base, codec)
        without: set[str] = set()
        for _ in range(_TRIES):
            if sums is not None:
                break
            setup = self._set_up(call, without)
            sums = self._begin(call, base, codec)
            if setup.refused and setup.refused != "beacon":
                break
            without = set(setup.failures) if setup.refused else set()
        sums = sums or []
        self._headers.begin([self._begun(each.round, base) for each in sums])
        there = {name for each in sums for name in each.round.participants}
        return Beginning(
            sums=sums,
            out={name: self._why(name, fresh=self._epoch > before) for name in call.cohort if name not in there},
            epoch=self._epoch,
            setup=self._epoch > before,
            riding=self._ride(call, first=any(each.round.index == 1 for each in sums)),
        )

    def end(self, sums: Sequence[Sum]) -> None:
        """Take note of what became of a round: a sum that was left out ends the epoch."""
        if any(each.refused == "range" for each in sums):
            self._groups = []

    def lost(self, call: Call, base: bytes) -> bool:
        """Whether clients may refuse to train from a model, as a round that did is neither burnt nor can be.

        Rounds that were given up are burnt first, by those of their members that can be reached.
        """
        left = False
        for begun in self._headers.of(base):
            if self._headers.certificate(begun.header) is None and not self._burn(call, begun):
                left = True
        return left

    def _begin(self, call: Call, base: bytes, codec: Callable[[int], Codec]) -> list[Sum] | None:
        """The round in every group, or None where it is time for a new epoch."""
        if not self._groups or min(group.rounds_left for group in self._groups) < 1:
            return None
        burnt = [self._headers.certificate(begun.header) for begun in self._headers.of(base)]
        certificates = [certificate for certificate in burnt if certificate is not None]
        sums = []
        for group in self._groups:
            try:
                sums.append(self._begin_in(group, call, base=base, codec=codec, burnt=certificates))
            except SecAggError as e:
                if e.reason != "index":  # used up, as it has to be
                    log.warning("epoch_ends_early", group=group.index, live=len(group.live))
                self._groups = []
                return None
        return sums

    @staticmethod
    def _begin_in(
        group: Group, call: Call, *, base: bytes, codec: Callable[[int], Codec], burnt: Sequence[bytes]
    ) -> Sum:
        """The round in one group."""
        participants = tuple(name for name in group.names if name in group.live)
        while participants:
            coder = codec(len(participants))
            round_ = group.begin(
                server_round=call.server_round,
                base=base,
                codec=coder.digest,
                size=coder.size,
                participants=participants,
                burnt=burnt,
            )
            if len(round_.participants) == len(participants):
                return Sum(group=group, round=round_, codec=coder)
            participants = round_.participants  # a ring leaves out who has too few neighbours; the codec counts heads
        raise SecAggError("participants")

    def _set_up(self, call: Call, without: Collection[str]) -> SetUp:
        """Go on with the set-up that rode with earlier rounds, or do one, until it ends."""
        riding, self._next = self._next, SetUp.nothing()
        self._note(riding)
        setup = riding if riding.running or riding.groups() else self._fresh(set(call.cohort) - set(without))
        while setup.running:
            self._trip(call, setup)
        self._note(setup)
        self._groups, self._failures, self._cohort = setup.groups(), setup.failures, frozenset(call.cohort)
        self._epoch += 1
        if setup.refused:
            log.warning("no_epoch", reason=setup.refused)
        return setup

    def _fresh(self, cohort: Collection[str]) -> SetUp:
        names = [name for name in cohort if self._withheld[name] < _MOST_WITHHELD]
        return SetUp(self._rules, records=self._records, names=names)

    def _note(self, setup: SetUp) -> None:
        """Remember, once, who spoilt a set-up."""
        self._withheld.update(setup.withheld)
        setup.withheld = set()

    def _trip(self, call: Call, setup: SetUp) -> None:
        """One step of a set-up, in messages of its own."""
        steps = {name: Step(setup=request) for name, request in setup.requests().items()}
        messages = steps_alone(steps, nodes=call.nodes, record=call.record)
        for heard in hear(call.grid, messages, names=call.names, timeout=call.timeout):
            setup.take(heard)
        setup.close()

    def _ride(self, call: Call, *, first: bool) -> SetUp:
        """The next epoch's set-up, from when its steps just fit on what is left of this one.

        Not in an epoch's first round: members hold two epochs, and then the last one may still be among them.
        """
        left = min((group.rounds_left for group in self._groups), default=0)
        if first or not self._fixed or not self._groups or call.server_round + left >= self._rounds:
            return SetUp.nothing()
        if left < _RIDE_ROUNDS and not self._next.running and not self._next.groups():
            self._note(self._next)
            self._next = self._fresh(call.cohort)
        return self._next

    def _why(self, name: str, *, fresh: bool) -> FailureCode:
        """Why somebody of the cohort is in no sum."""
        if not fresh:
            return FailureCode.NOT_IN_EPOCH
        return self._failures.get(name, FailureCode.AGGREGATION_ABORTED)

    def _burn(self, call: Call, begun: Begun) -> bool:
        """Collect statements that a round is given up; whether a quorum made them."""
        burning = Burning(begun.header, begun.participants, rules=self._rules, records=self._records)
        steps = {name: Step(round=burning.request()) for name in begun.participants}
        record = call.record.copy()
        if COHORT in record:  # members of another cohort are asked as that
            record[COHORT] = json.dumps(begun.participants)
        messages = steps_alone(steps, nodes=call.nodes, record=record)
        names = {node: name for name, node in call.nodes.items()}
        for heard in hear(call.grid, messages, names=names, timeout=call.timeout):
            if heard.round is None:
                continue
            try:
                burning.stated(heard.name, heard.round)
            except SecAggError as e:
                log.warning("step_refused", client=heard.name, reason=e.reason)
        if burning.burnt:
            self._headers.burn(begun.header, burning.certificate())
        log.warning("round_given_up", burnt=burning.burnt)
        return burning.burnt

    def _begun(self, round_: Round, base: bytes) -> Begun:
        return Begun(header=round_.header, base=base, participants=round_.participants, epoch=self._epoch)
