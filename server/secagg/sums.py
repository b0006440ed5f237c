"""One group's sum in one round, from the first masked update to the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from common.errors import FailureCode
from common.secagg import Group, Round, SecAggError
from common.secagg.fixed_point import Codec, Decoded
from server.job import SumRecord
from server.secagg.steps import Heard

log = structlog.get_logger()


@dataclass(kw_only=True, slots=True, eq=False)
class Sum:
    """A round of one group, and what came of it.

    Attributes:
        group: Who could be asked.
        round: The protocol's state.
        codec: What the vectors stand for.
        refused: Why there is no sum, in a word; empty as long as there can be one.
        total: uint32[codec.size]: the sum, once it is open.
        decoded: What it stands for.
    """

    group: Group
    round: Round
    codec: Codec
    refused: str = ""
    total: NDArray[np.uint32] | None = None
    decoded: Decoded | None = None

    @property
    def opened(self) -> bool:
        """Whether the sum is known."""
        return self.decoded is not None

    def add(self, heard: Heard) -> FailureCode | None:
        """Add a masked update; why it cannot be."""
        if heard.masked is None:
            return FailureCode.INVALID_REPLY
        try:
            self.round.add(heard.name, heard.masked)
        except SecAggError as e:
            log.warning("masked_update_refused", client=heard.name, reason=e.reason)
            return FailureCode.INVALID_REPLY
        return None

    def agree(self) -> bytes | None:
        """The request to agree on the survivors; None if they are too few."""
        try:
            return self.round.agree()
        except SecAggError as e:
            self.refused = e.reason
            return None

    def state(self, heard: Heard) -> bool:
        """What a survivor states; whether it is what was asked for."""
        return self._taken(heard, self.round.stated)

    def release(self, heard: Heard) -> bool:
        """What a signer releases; whether it is what was asked for."""
        return self._taken(heard, self.round.shares)

    @staticmethod
    def _taken(heard: Heard, take: Callable[[str, bytes], None]) -> bool:
        if heard.failure is not None or heard.round is None:
            return False
        try:
            take(heard.name, heard.round)
        except SecAggError as e:
            log.warning("step_refused", client=heard.name, reason=e.reason)
            return False
        return True

    def open(self) -> None:
        """Form the sum, if it can be formed, and see what it stands for.

        A sum that no admissible updates have is nobody's: one member that masked anything else spoils it, and nobody
        can tell who.
        """
        if self.refused:
            return
        try:
            total = self.round.result()
            self.decoded = self.codec.decode(total, len(self.round.survivors))
            self.total = total
        except SecAggError as e:
            self.refused = e.reason

    def record(self) -> SumRecord:
        """For the round's record."""
        return SumRecord(
            members=len(self.group.names),
            asked=len(self.round.participants),
            survivors=len(self.round.survivors) if self.opened else 0,
            threshold=self.group.shape.threshold,
            refused=self.refused,
        )
