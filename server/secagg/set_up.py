"""Sets up the keys of one epoch: steps out, answers in, leg by leg, whatever carries them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Self

import structlog

from common.crypto import PartyRecord
from common.errors import FailureCode
from common.secagg import Group, Rules, SecAggError, Setup
from server.secagg.steps import Heard

log = structlog.get_logger()


class SetUp:
    """One set-up. It ends in groups, or with a reason; who does not answer as it should is not in the epoch.

    Attributes:
        failures: Why clients are not in the epoch, as far as they said so.
        refused: Why there is no epoch, in a word.
        withheld: Who committed to a nonce and did not reveal it: each such set-up costs every other member one of the
            few that it may give up in a day.
    """

    def __init__(self, rules: Rules, *, records: Mapping[str, PartyRecord], names: Collection[str]) -> None:
        """Begin.

        Args:
            rules: The run's.
            records: Pinned records by name; nobody else can be a member.
            names: Who is asked.
        """
        self.failures: dict[str, FailureCode] = {}
        self.refused = ""
        self.withheld: set[str] = set()
        self._machine: Setup | None = None
        members = sorted(name for name in names if name in records)
        for name in sorted(set(names) - set(members)):
            log.warning("no_keys_of_this_site", site=name)
        try:
            self._machine = Setup(rules, records=records, names=members)
        except SecAggError as e:
            self.refused = e.reason

    @classmethod
    def nothing(cls) -> Self:
        """One that asks nobody."""
        none = cls.__new__(cls)
        none.failures, none.refused, none.withheld = {}, "none", set()
        none._machine = None  # noqa: SLF001 - of this class
        return none

    @property
    def running(self) -> bool:
        """Whether there are steps left."""
        return not self.refused and self._machine is not None and self._machine.leg is not None

    def requests(self) -> dict[str, bytes]:
        """The present step, for each client that it is for."""
        return self._machine.requests() if self._machine is not None and self.running else {}

    def take(self, heard: Heard) -> None:
        """An answer to the present step, or why there is none."""
        if self._machine is None or not self.running:
            return
        if heard.setup is None:
            self.failures[heard.name] = heard.failure or FailureCode.AGGREGATION_REFUSED
            return
        try:
            self._machine.receive(heard.name, heard.setup)
        except SecAggError as e:
            log.warning("setup_answer_refused", client=heard.name, reason=e.reason)
            self.failures[heard.name] = FailureCode.INVALID_REPLY
            if self._machine.leg == "reveal":
                self.withheld.add(heard.name)

    def close(self) -> None:
        """No more answers to the present step come."""
        if self._machine is None or not self.running:
            return
        if self._machine.leg == "reveal":
            self.withheld |= self._machine.requests().keys()
        try:
            self._machine.advance()
        except SecAggError as e:
            self.refused = e.reason

    def groups(self) -> list[Group]:
        """What was set up; empty if it was given up, or is still going on."""
        return [] if self._machine is None or self.refused or self.running else self._machine.groups()
