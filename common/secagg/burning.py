"""Giving a round up for good: a quorum of its participants states that it will never be opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.secagg.agreement import check_statement
from common.secagg.messages import Burn, Certificate, Statement
from common.secagg.parameters import Rules, quorum
from common.secagg.parties import Record
from common.secagg.refusal import SecAggError


class Burning:
    """The coordinator's end. Needs only the header and who took part, so that a later process can do it.

    Args:
        header: The round's digest.
        participants: Names of all that were asked in it.
        rules: The run's.
        records: The pinned records of all sites.
    """

    def __init__(
        self, header: bytes, participants: Sequence[str], *, rules: Rules, records: Mapping[str, Record]
    ) -> None:
        self.header, self.participants = header, tuple(sorted(participants))
        self._records = records
        self._least = quorum(len(self.participants), rules.colluding)
        self._signatures: dict[str, bytes] = {}

    def request(self) -> bytes:
        """What every participant is asked, the same for all."""
        return Burn(header=self.header).to_bytes()

    def stated(self, name: str, reply: bytes) -> None:
        """Take a participant's statement.

        Raises:
            SecAggError: `participants`, `statement`, `signature` or `format`: it does not count.
        """
        if name not in self.participants:
            raise SecAggError("participants")
        said = Statement.from_bytes(reply)
        if said.header != self.header or not said.burnt:
            raise SecAggError("statement")
        check_statement(said, self._records[name])
        self._signatures[name] = said.signature

    @property
    def burnt(self) -> bool:
        """Whether a quorum said so."""
        return len(self._signatures) >= self._least

    def certificate(self) -> bytes:
        """What lets members train on the round's model again.

        Raises:
            SecAggError: `quorum`: too few said so yet.
        """
        if not self.burnt:
            raise SecAggError("quorum")
        signers = sorted(self._signatures)[: self._least]
        chosen = {name: self._signatures[name] for name in signers}
        return Certificate(header=self.header, signatures=chosen).to_bytes()
