"""The coordinator's end of one round: sums masked vectors, has the survivors agreed on, and takes their masks away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.secagg import escrow
from common.secagg.agreement import check_statement
from common.secagg.burning import Burning
from common.secagg.masks import MaskKey, apply_masks
from common.secagg.messages import Agree, Released, Statement, Train, Unmask
from common.secagg.packing import add_packed
from common.secagg.parameters import Rules
from common.secagg.parties import Record
from common.secagg.recovery import Recovery
from common.secagg.refusal import SecAggError
from common.secagg.roster import Circle


@dataclass(frozen=True, kw_only=True, slots=True)
class Custody:
    """What the coordinator keeps for one round of a group, by the rank of its owner.

    Attributes:
        vaults: As deposited.
        commitments: To b and to kappa.
        pairs: Neighbours whose keys are in the vault, in its order.
    """

    vaults: Mapping[int, bytes]
    commitments: Mapping[int, tuple[bytes, bytes]]
    pairs: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a round is about.

    Attributes:
        epoch: 16 bytes.
        index: Of the round within the epoch.
        header: The round's digest.
        participants: Ranks.
        certificates: Of burnt rounds that started from the same model.
        size: Entries of a vector.
    """

    epoch: bytes
    index: int
    header: bytes
    participants: tuple[int, ...]
    certificates: tuple[bytes, ...]
    size: int


class Round:
    """One round of one group: `requests` and `add`, `agree` and `stated`, `unmask` and `shares`, `result`.

    A member that sends nonsense, or nothing, is as one that dropped out at that step. Memory: one vector, whatever the
    number of members.

    Guarantee:
        `result` is the exact sum mod 2^bits of what the survivors masked, if they keep to the protocol; or it raises.
    """

    def __init__(
        self,
        circle: Circle,
        terms: Terms,
        custody: Custody,
        *,
        rules: Rules,
        records: Mapping[str, Record],
    ) -> None:
        self.header = terms.header
        self.index = terms.index
        self.participants = tuple(circle.names[rank] for rank in terms.participants)
        self._circle, self._terms, self._custody = circle, terms, custody
        self._rules, self._records = rules, records
        self._ranks = dict(zip(self.participants, terms.participants, strict=True))
        self._total: npt.NDArray[np.uint32] = np.zeros(terms.size, np.uint32)
        self._sent: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._signatures: dict[int, bytes] = {}
        self._needed: tuple[int, ...] = ()
        self._released: dict[int, Mapping[int, bytes]] = {}
        self._counts: Counter[int] = Counter()
        self._opened = False

    def requests(self) -> dict[str, bytes]:
        """What goes beside the model, by member: the same for all."""
        request = Train(
            epoch=self._terms.epoch,
            index=self._terms.index,
            participants=self._terms.participants,
            certificates=self._terms.certificates,
        ).to_bytes()
        return dict.fromkeys(self.participants, request)

    def add(self, name: str, packed: npt.NDArray[np.uint8]) -> None:
        """Add a masked vector.

        Raises:
            SecAggError: `participants`: it was not asked for, or came before; `survivors`: it comes too late, and will
                never be used; `format`: it has not the right length.
        """
        rank = self._rank(name)
        if self._survivors:
            raise SecAggError("survivors")
        if rank in self._sent:
            raise SecAggError("participants")
        add_packed(self._total, packed, self._rules.bits)
        self._sent.add(rank)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, so far."""
        return tuple(name for name, rank in self._ranks.items() if rank in self._sent)

    def agree(self) -> bytes:
        """What the survivors are asked to state, the same for all. From now on no vector is added.

        Raises:
            SecAggError: `survivors`: they are too few, or on a ring one has too few neighbours among them.
        """
        survivors = tuple(sorted(self._sent))
        if len(survivors) < self._circle.shape.fewest or self._circle.isolated(survivors):
            raise SecAggError("survivors")
        self._survivors, self._needed = survivors, self._owners(set(survivors))
        return Agree(epoch=self._terms.epoch, index=self._terms.index, survivors=survivors).to_bytes()

    def stated(self, name: str, reply: bytes) -> None:
        """Take a survivor's statement.

        Raises:
            SecAggError: `survivors`, `statement`, `signature` or `format`: it does not count.
        """
        rank = self._rank(name)
        said = Statement.from_bytes(reply)
        if rank not in self._survivors:
            raise SecAggError("survivors")
        if (said.header, said.survivors) != (self.header, self._survivors):
            raise SecAggError("statement")
        check_statement(said, self._records[name])
        self._signatures[rank] = said.signature

    @property
    def signers(self) -> tuple[str, ...]:
        """Who stated the survivors, and so can release shares."""
        return tuple(name for name, rank in self._ranks.items() if rank in self._signatures)

    @property
    def agreed(self) -> bool:
        """Whether a quorum stated the survivors."""
        return len(self._signatures) >= self._circle.shape.quorum

    def unmask(self) -> bytes:
        """What the signers are asked, the same for all: with every signature, of which each looks at some.

        Raises:
            SecAggError: `quorum`: too few stated the survivors yet.
        """
        if not self.agreed:
            raise SecAggError("quorum")
        return Unmask(
            epoch=self._terms.epoch,
            index=self._terms.index,
            survivors=self._survivors,
            signatures=dict(sorted(self._signatures.items())),
        ).to_bytes()

    def shares(self, name: str, reply: bytes) -> None:
        """Take the shares that a member releases, once; whether they are right shows at the end.

        Raises:
            SecAggError: `shares` or `format`: they are for another round, or not from one who holds them.
        """
        rank = self._rank(name)
        released = Released.from_bytes(reply)
        if released.header != self.header or not released.shares.keys() <= set(self._circle.neighbours[rank]):
            raise SecAggError("shares")
        if rank not in self._released:
            self._released[rank] = released.shares
            self._counts.update(released.shares.keys())

    @property
    def ready(self) -> bool:
        """Whether there are shares enough, if all are right."""
        threshold = self._circle.shape.threshold
        return bool(self._survivors) and all(self._counts[rank] >= threshold for rank in self._needed)

    def result(self) -> npt.NDArray[np.uint32]:
        """The sum, uint32[size].

        Raises:
            SecAggError: `shares`: too few yet, or too many are wrong. More may be added, and this tried again.
        """
        if not self._opened:
            if not self.ready:
                raise SecAggError("shares")
            apply_masks(self._total, self._mask_keys())
            self._total &= np.uint32((1 << self._rules.bits) - 1)
            self._opened = True
            self._released = {}
        return self._total

    def burning(self) -> Burning:
        """Give the round up."""
        return Burning(self.header, self.participants, rules=self._rules, records=self._records)

    def _mask_keys(self) -> list[MaskKey]:
        """All masks that are left in the sum, with the opposite signs."""
        recovery, survivors, keys = Recovery(self._circle.shape.threshold), set(self._survivors), []
        for rank in self._needed:
            if rank in survivors:
                b = self._secret(recovery, rank, escrow.SELF)
                keys.append(MaskKey(escrow.self_mask_key(b, self.header), -1))
            else:
                keys += self._pair_keys(rank, self._secret(recovery, rank, escrow.VAULT), survivors)
        return keys

    def _pair_keys(self, dropped: int, kappa: bytes, survivors: set[int]) -> list[MaskKey]:
        """The masks that survivors share with one who dropped out."""
        pairs = escrow.open_vault(
            kappa,
            self._custody.vaults[dropped],
            group=self._circle.digest,
            rank=dropped,
            index=self.index,
            neighbours=self._custody.pairs[dropped],
        )
        left = [j for j in self._circle.neighbours[dropped] if j in survivors]
        return [MaskKey(escrow.pair_mask_key(pairs[j], self.header), -1 if j < dropped else 1) for j in left]

    def _secret(self, recovery: Recovery, owner: int, kind: int) -> bytes:
        committed = self._custody.commitments[owner][kind]
        return recovery.secret(
            self._shares_of(owner),
            places={j: place for place, j in enumerate(self._circle.neighbours[owner], start=1)},
            fits=lambda secret: escrow.commitment(self._circle.digest, owner, self.index, kind, secret) == committed,
        )

    def _shares_of(self, owner: int) -> dict[int, bytes]:
        """Released shares of one member's secret, by holder."""
        return {
            j: self._released[j][owner]
            for j in self._circle.neighbours[owner]
            if j in self._released and owner in self._released[j]
        }

    def _owners(self, survivors: set[int]) -> tuple[int, ...]:
        """Whose secrets are needed: all survivors', and those of the dropped that share masks with survivors."""
        near = self._circle.neighbours
        return tuple(j for j in self._terms.participants if j in survivors or survivors.intersection(near[j]))

    def _rank(self, name: str) -> int:
        if name not in self._ranks:
            raise SecAggError("participants")
        return self._ranks[name]
