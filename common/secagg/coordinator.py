"""The coordinator's end of a group, over the rounds of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from common.secagg.member_round import header_of
from common.secagg.messages import Deposited
from common.secagg.parameters import Rules, Shape
from common.secagg.parties import Record
from common.secagg.refusal import SecAggError
from common.secagg.roster import Circle
from common.secagg.round import Custody, Round, Terms


class Group:
    """The members that finished an epoch's set-up together, and what they deposited.

    Attributes:
        names: Those members, sorted.
        live: Those of them that are still asked; the caller removes who lost its state.
        rounds_left: How many indices are unused.
    """

    def __init__(
        self,
        circle: Circle,
        deposits: Mapping[int, Deposited],
        *,
        epoch: bytes,
        rules: Rules,
        records: Mapping[str, Record],
    ) -> None:
        self.epoch = epoch
        self.names = tuple(circle.names[rank] for rank in sorted(deposits))
        self.live = set(self.names)
        self.rounds_left = rules.epoch_rounds
        self._circle, self._rules, self._records = circle, rules, records
        self._ranks = {circle.names[rank]: rank for rank in deposits}
        self._vaults = {rank: list(deposited.vaults) for rank, deposited in deposits.items()}
        self._commitments = {rank: deposited.commitments for rank, deposited in deposits.items()}
        self._pairs = {rank: tuple(sorted(deposited.shares)) for rank, deposited in deposits.items()}

    @property
    def index(self) -> int:
        """Which group of the epoch this is."""
        return self._circle.index

    @property
    def shape(self) -> Shape:
        """The group's numbers."""
        return self._circle.shape

    def begin(
        self,
        *,
        server_round: int,
        base: bytes,
        codec: bytes,
        size: int,
        participants: Iterable[str],
        burnt: Sequence[bytes] = (),
    ) -> Round:
        """Begin the next round.

        Args:
            server_round: As the members will be told.
            base: Digest of the model, as the members will compute it.
            codec: Digest of how updates become vectors.
            size: Entries of a vector.
            participants: Names, all of them live.
            burnt: Certificates of burnt rounds that started from this model.

        Returns:
            The round. On a ring, who has too few neighbours among the participants is not asked.

        Raises:
            SecAggError: `participants`: too few, or not live, or on a ring too few that are near each other; `index`:
                the epoch is over.
        """
        names = set(participants)
        if not names <= self.live or not self.live <= set(self.names):
            raise SecAggError("participants")
        if not self.rounds_left:
            raise SecAggError("index")
        ranks = self._circle.connected(self._ranks[name] for name in names)
        if len(ranks) < self._circle.shape.fewest:
            raise SecAggError("participants")
        index = self._rules.epoch_rounds - self.rounds_left + 1
        header = header_of(
            self._circle.digest,
            rules=self._rules,
            server_round=server_round,
            index=index,
            participants=ranks,
            base=base,
            codec=codec,
        )
        terms = Terms(
            epoch=self.epoch, index=index, header=header, participants=ranks, certificates=tuple(burnt), size=size
        )
        custody = Custody(
            vaults={rank: self._vaults[rank][index - 1] for rank in ranks},
            commitments={rank: self._committed(rank, index) for rank in ranks},
            pairs=self._pairs,
        )
        self.rounds_left -= 1
        return Round(
            self._circle,
            terms,
            custody,
            rules=self._rules,
            records=self._records,
        )

    def _committed(self, rank: int, index: int) -> tuple[bytes, bytes]:
        b, kappa = self._commitments[rank][2 * index - 2 : 2 * index]
        return b, kappa
