"""A member of secure aggregation: everything that a site checks before it says or masks anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

from common.secagg import member_round, member_setup
from common.secagg.codec import Reader
from common.secagg.mask import Mask
from common.secagg.member_state import Epoch, Party, Saved, Step
from common.secagg.messages import Agree, Burn, Train, Unmask, kind_of
from common.secagg.parameters import Rules
from common.secagg.parties import Journal, Record, Signer
from common.secagg.refusal import SecAggError

_SETUP: Final = {
    "reveal": member_setup.reveal,
    "exchange": member_setup.exchange,
    "deposit": member_setup.deposit,
    "inbox": member_setup.receive,
}
_ID_AT, _ID_BYTES = 2, 16
"""Where every message of an epoch has its id."""


class Member:
    """One site's end of a run's secure aggregation.

    It derives every threshold itself from the run's rules and the roster; the coordinator says no number but a round's
    index. It holds two epochs, the current and the next.

    Args:
        name: Its own, as in its pinned record.
        signer: Its identity key.
        peers: The pinned records of all sites, its own among them.
        rules: The run's.
        journal: What it must not forget. An older state of a member (`to_bytes`) with the same journal can lose
            rounds, and nothing else.
        most_aborts: How many epochs a day may be given up after this member revealed its nonce.

    Guarantee:
        A message that is refused changes nothing. A request that was answered has the same answer again, and no other
        request for the same step has any. Not safe for threads: callers hold a lock.
    """

    def __init__(
        self,
        name: str,
        *,
        signer: Signer,
        peers: Mapping[str, Record],
        rules: Rules,
        journal: Journal,
        most_aborts: int = 20,
    ) -> None:
        if name not in peers or peers[name].key_id != signer.record.key_id:
            raise SecAggError("roster")
        self._party = Party(
            name=name, signer=signer, peers=peers, rules=rules, journal=journal, most_aborts=most_aborts
        )
        self._epochs: dict[bytes, Epoch] = {}

    @property
    def rules(self) -> Rules:
        """What it holds the coordinator to."""
        return self._party.rules

    def answer(self, message: bytes) -> bytes:
        """Answer any message but that of a training.

        Raises:
            SecAggError: It is refused.
        """
        kind = kind_of(message)
        if kind == "advertise":
            return self._advertise(message)
        if kind in _SETUP:
            return _SETUP[kind](self._party, self._epoch(_epoch_id(message)), message)
        if kind == "agree":
            agree = Agree.from_bytes(message)
            return member_round.agree(self._party, self._epoch(agree.epoch), agree)
        if kind == "unmask":
            unmask = Unmask.from_bytes(message)
            return member_round.unmask(self._party, self._epoch(unmask.epoch), unmask)
        if kind == "burn":
            return member_round.burn(self._party, Burn.from_bytes(message))
        raise SecAggError("format")

    def begin(self, message: bytes, *, server_round: int, base: bytes, codec: bytes) -> Mask:
        """Begin a round, before its training: from now on its index and its model are used up.

        Args:
            message: The `Train` that came with the model.
            server_round: As the model's message says.
            base: Digest of the model, made by this site itself from the arrays it got.
            codec: Digest of how updates become vectors.

        Raises:
            SecAggError: It is refused.
        """
        asked = Train.from_bytes(message)
        epoch = self._epoch(asked.epoch)
        mask = member_round.begin(self._party, epoch, asked, server_round=server_round, base=base, codec=codec)
        for other in tuple(self._epochs.values()):
            if other is epoch:
                break
            self._drop(other)  # older: the shares of its rounds are not needed any more
        return mask

    def leave(self) -> None:
        """Drop all epochs, for good: what is only forgotten could not be counted as thrown away."""
        for epoch in tuple(self._epochs.values()):
            self._drop(epoch)

    def to_bytes(self) -> bytes:
        """The member's state, with its secrets in clear: for memory, or a folder of this user alone."""
        epochs = tuple(epoch.to_bytes() for epoch in self._epochs.values())
        party = self._party
        return Saved(name=party.name, rules=party.rules.digest, most_aborts=party.most_aborts, epochs=epochs).to_bytes()

    @classmethod
    def from_bytes(
        cls, data: bytes, *, signer: Signer, peers: Mapping[str, Record], rules: Rules, journal: Journal
    ) -> Self:
        """Read `to_bytes`.

        Raises:
            SecAggError: `format`; `rules`: it was saved under others; `roster`: it is another party's.
        """
        saved = Saved.from_bytes(data)
        if saved.rules != rules.digest:
            raise SecAggError("rules")
        member = cls(
            saved.name, signer=signer, peers=peers, rules=rules, journal=journal, most_aborts=saved.most_aborts
        )
        epochs = map(Epoch.from_bytes, saved.epochs)
        member._epochs = {epoch.id: epoch for epoch in epochs}
        return member

    def _advertise(self, message: bytes) -> bytes:
        known = self._epochs.get(_epoch_id(message))
        if known is not None:
            return known.again(Step.ADVERTISED, message)
        epoch = member_setup.advertise(self._party, message)
        for other in self._leaving():
            self._drop(other)
        self._epochs[epoch.id] = epoch
        return epoch.answers[Step.ADVERTISED][32:]

    def _drop(self, epoch: Epoch) -> None:
        if Step.REVEALED in epoch.answers:  # its beacon could be known and it was never used: a draw was thrown away
            self._party.journal.aborted()
        del self._epochs[epoch.id]

    def _leaving(self) -> list[Epoch]:
        """Who makes room for a new epoch: all that are not set up; of two that are, the unused, or else the older."""
        leaving = [epoch for epoch in self._epochs.values() if epoch.step < Step.READY]
        ready = [epoch for epoch in self._epochs.values() if epoch.step >= Step.READY]
        if len(ready) > 1:
            leaving.append(next((epoch for epoch in ready if epoch.step != Step.USED), ready[0]))
        return leaving

    def _epoch(self, epoch: bytes) -> Epoch:
        if epoch not in self._epochs:
            raise SecAggError("epoch")
        return self._epochs[epoch]

    def __repr__(self) -> str:
        return f"Member(name={self._party.name!r}, epochs={list(self._epochs.values())})"


def _epoch_id(message: bytes) -> bytes:
    return Reader(message[_ID_AT:]).take(_ID_BYTES)
