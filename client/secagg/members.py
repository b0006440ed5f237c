"""Where a client keeps the secrets of secure aggregation between messages: in memory, wherever that is."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from flwr.app import ArrayRecord, Context

from common.flower import to_record
from common.secagg.member import Member
from common.secagg.parameters import Rules
from common.secagg.parties import Journal, Record, Signer

_MEMBER: Final = "secagg-member"
"""Record of a simulated client's own state, never sent."""
STALE_SECONDS: Final = 86_400.0
"""How long the secrets of a member wait for the next message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """One client's place in one run: everything about its membership but the secrets.

    Attributes:
        name: The client.
        signer: Its identity keys.
        peers: Records of everybody whom it accepts beside itself in a sum, and its own.
        rules: What it holds the coordinator to, made from the run's configuration by itself.
        journal: What it has used and signed.
        most_aborts: Set-ups that may fail in a day.
    """

    name: str
    signer: Signer = field(repr=False)
    peers: Mapping[str, Record] = field(repr=False)
    rules: Rules
    journal: Journal = field(repr=False)
    most_aborts: int

    def new(self) -> Member:
        """A member without an epoch."""
        return Member(
            self.name,
            signer=self.signer,
            peers=self.peers,
            rules=self.rules,
            journal=self.journal,
            most_aborts=self.most_aborts,
        )

    def restored(self, data: bytes) -> Member:
        """The member that `Member.to_bytes` wrote.

        Raises:
            SecAggError: The bytes are no member.
        """
        return Member.from_bytes(data, signer=self.signer, peers=self.peers, rules=self.rules, journal=self.journal)


class Members(Protocol):
    """Keeps one site's members, or each simulated client's own, from one message to the next."""

    def open(self, run_id: bytes, seat: Callable[[], Seat], context: Context) -> AbstractContextManager[Member]:
        """The member in a run; what changes in it is kept when the block ends, also with an error.

        Args:
            run_id: The run.
            seat: Makes the seat in it, where that is needed.
            context: Of the message that is answered.
        """


class MemoryMembers:
    """Members of a process that lives on: they end with it. Nothing is written anywhere."""

    def __init__(self, *, most: int = 4) -> None:
        """Keep the members of the last few runs.

        Args:
            most: How many; whoever comes back to an earlier run joins its next epoch.
        """
        self._members: OrderedDict[bytes, tuple[float, Member]] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    @contextmanager
    def open(self, run_id: bytes, seat: Callable[[], Seat], context: Context) -> Iterator[Member]:  # noqa: ARG002
        """See `Members`."""
        with self._lock:
            now = time.monotonic()
            _, member = self._members.pop(run_id, (now, None))
            member = member or seat().new()
            self._members[run_id] = now, member
            while self._is_one_too_many(now):
                _, (_, leaving) = self._members.popitem(last=False)
                leaving.leave()  # or a coordinator with a few more runs could draw an order as often as it liked
            yield member

    def _is_one_too_many(self, now: float) -> bool:
        """Whether the member that was used longest ago has to go."""
        used, _ = next(iter(self._members.values()))
        return len(self._members) > self._most or now - used > STALE_SECONDS

    def __repr__(self) -> str:
        return f"MemoryMembers({len(self._members)})"


class ContextMembers:
    """Members of simulated clients, in the state that Flower keeps for each of them: any process can go on with it.

    The secrets lie there in clear. They protect nobody: all clients of a simulation are one person's.
    """

    @contextmanager
    def open(self, run_id: bytes, seat: Callable[[], Seat], context: Context) -> Iterator[Member]:
        """See `Members`."""
        kept = context.state.get(_MEMBER)
        data = kept.get(run_id.hex()) if isinstance(kept, ArrayRecord) else None
        member = seat().restored(data.numpy().tobytes()) if data is not None else seat().new()
        try:
            yield member
        finally:
            bytes_ = np.frombuffer(member.to_bytes(), dtype=np.uint8)
            context.state[_MEMBER] = to_record({run_id.hex(): bytes_})
