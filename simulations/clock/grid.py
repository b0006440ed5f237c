"""A grid on which virtual time passes: who is late, or goes away, is never asked, and the others answer in time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.flower import ROUND, answering, config_of, failure_reply
from server.grids.base import FIRST_NODE, WrappingGrid, stream_replies
from server.grids.broadcast import Broadcast, CohortGrid, Fate
from server.grids.outstanding import Deferred
from simulations.clock.timing import Timing, Visit, settle
from simulations.clock.virtual import Launch, Order, VirtualClock

_TRAIN: Final = MessageType.TRAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A client at work, in an asynchronous round."""

    message: Message
    asked: Order
    launched: float
    visit: Visit
    place: int
    """In the order of pushing."""

    @property
    def arrives(self) -> float:
        return self.launched + self.visit.seconds

    @property
    def order(self) -> tuple[float, int]:
        """Earlier arrivals first; of those at the same moment, who was asked first."""
        return self.arrives, self.place


class ClockedGrid(WrappingGrid):
    """Lets training take virtual time. Other messages take none.

    Guarantee: what becomes of a client depends on its device, its examples, the round and the moment when it was asked,
    never on the grid inside, on workers, or on how messages are put together in calls. A client that goes away or is
    late does not train at all; the time that it was at work counts as wasted, and so does that of a client whose reply
    is a failure. The clock never goes back.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        timing: Timing,
        clock: VirtualClock,
        names: Sequence[str],
        examples: Callable[[int], int],
        enough: int | None = None,
    ) -> None:
        """Wrap a grid of simulated clients; sealed or not.

        Args:
            inner: Answers messages; is never given a deadline, since it would be one on the wall.
            timing: How long each client takes.
            clock: Is moved on.
            names: Of all clients, by their place in the population.
            examples: How many a client trains on, by its place.
            enough: So many answers end a round; they count when they arrive, before anybody has looked at them.
        """
        super().__init__(inner)
        self._timing, self._clock, self._names, self._examples, self._enough = timing, clock, names, examples, enough
        self._place_of: Callable[[int], int] | None = None
        self._numbers = count(1)
        self._flights: dict[str, _Flight] = {}
        self._deferred = Deferred(lambda messages, _: stream_replies(self._inner, messages, None))
        self._computed: dict[str, str] = {}
        """Ids under which the inner grid's replies wait, by the flights' own."""

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:  # noqa: ARG002
        """Failures of those who do not come to an answer, then the others' replies; the clock is at the round's end."""
        messages = messages if isinstance(messages, Sequence) else list(messages)
        if not messages or messages[0].metadata.message_type != _TRAIN:
            yield from stream_replies(self._inner, messages, None)
            return
        nodes = [message.metadata.dst_node_id for message in messages]
        visits, end = self._visits(nodes, _round_of(messages[0]))
        self._take(visits, end)
        for message, visit in zip(messages, visits, strict=True):
            if visit.failure is not None:
                yield failure_reply(message, visit.failure)
        worked = {node: visit.seconds for node, visit in zip(nodes, visits, strict=True) if visit.failure is None}
        asked = [message for message in messages if message.metadata.dst_node_id in worked]
        for reply in stream_replies(self._inner, asked, None) if asked else ():
            if reply.has_error():
                self._clock.wasted(worked.get(reply.metadata.src_node_id, 0.0))
            yield reply
            del reply  # or it stays in memory while the next one arrives

    def fold(
        self,
        messages: Broadcast,
        *,
        largest: float,
        timeout: float | None,  # noqa: ARG002 - see `CohortGrid`
    ) -> Iterator[Fate | Message] | None:
        """The same of a cohort that the grid inside trains as a whole; None where it does not."""
        if not isinstance(self._inner, CohortGrid):
            return None
        visits, end = self._visits(messages.nodes, _round_of(messages.template))
        failures = [
            Fate(node_id=node, failure=visit.failure)
            for node, visit in zip(messages.nodes, visits, strict=True)
            if visit.failure is not None
        ]
        worked = {n: visit.seconds for n, visit in zip(messages.nodes, visits, strict=True) if visit.failure is None}
        folded: Iterator[Fate | Message] | None = iter(())
        if worked:
            folded = self._inner.fold(messages.to(list(worked)), largest=largest, timeout=None)
        if folded is None:
            return None
        self._take(visits, end)
        return self._told(failures, folded, worked)

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Let clients begin at this moment; one that was at work when the run was left goes on where it was."""
        messages = list(messages)
        if messages and messages[0].metadata.message_type != _TRAIN:
            return super().push_messages(messages, timeout=timeout)
        return [self._launch(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        """The next reply to arrive, for which the clock moves on; all, where it is not said how many are needed.

        Replies come in the order of their virtual arrival; those of the same moment in the order in which they were
        pushed. So many as are needed are computed side by side, if they are the next to arrive.
        """
        ids = list(message_ids)
        own = [message_id for message_id in ids if message_id in self._flights]
        if not own:
            return super().pull_messages(ids, needed=needed)
        if needed is not None:
            return [self._land(own, max(1, needed))]
        replies = []
        while own:
            replies.append(self._land(own, len(own)))
            own = [message_id for message_id in own if message_id in self._flights]
        return replies

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """Nobody waits any more for these clients: what they did until now, they did in vain."""
        others = []
        for message_id in message_ids:
            flight = self._flights.pop(message_id, None)
            if flight is None:
                others.append(message_id)
                continue
            done = min(self._clock.now, flight.arrives) - flight.launched
            self._clock.worked(done, wasted=True)
            self._forget(message_id, flight)
        super().cancel_messages(others)

    def _visits(self, nodes: Sequence[int], server_round: int) -> tuple[list[Visit], float]:
        """What becomes of those who are asked now, and how long the round takes."""
        visits = [self._visit(node, server_round, self._clock.now) for node in nodes]
        return settle(visits, self._enough)

    def _visit(self, node: int, server_round: int, at: float) -> Visit:
        place = self._place(node)
        name, examples = self._names[place], self._examples(place)
        return self._timing.visit(place, name, examples=examples, server_round=server_round, at=at)

    def _take(self, visits: Sequence[Visit], seconds: float) -> None:
        """Let a round pass."""
        for visit in visits:
            self._clock.worked(visit.seconds, wasted=visit.failure is not None)
        self._clock.advance(self._clock.now + seconds)

    def _told(
        self, failures: Sequence[Fate], folded: Iterator[Fate | Message], worked: Mapping[int, float]
    ) -> Iterator[Fate | Message]:
        yield from failures
        for told in folded:
            if isinstance(told, Fate) and told.failure is not None:
                self._clock.wasted(worked[told.node_id])
            yield told

    def _place(self, node: int) -> int:
        """The place of a node in the population."""
        if self._place_of is None:
            self._place_of = _places(self._inner, self._names)
        return self._place_of(node)

    def _launch(self, message: Message) -> str:
        node, server_round = message.metadata.dst_node_id, _round_of(message)
        order = (self._names[self._place(node)], server_round)
        launched = self._clock.launched(order)
        visit = self._visit(node, server_round, launched)
        number = next(self._numbers)
        message_id = f"v{number}"
        flight = _Flight(message=message, asked=order, launched=launched, visit=visit, place=number)
        self._flights[message_id] = flight
        self._clock.launches[order] = Launch(at=launched, ends=flight.arrives)
        return message_id

    def _land(self, own: Sequence[str], needed: int) -> Message:
        """The earliest of these."""
        coming = heapq.nsmallest(needed, own, key=lambda message_id: self._flights[message_id].order)
        first = coming[0]
        flight = self._flights[first]
        failure = flight.visit.failure
        if failure is not None:
            reply = answering(failure_reply(flight.message, failure), first)
        else:
            reply = self._reply(first, coming)
        del self._flights[first]
        self._forget(first, flight)
        self._clock.advance(flight.arrives)
        self._clock.worked(flight.visit.seconds, wasted=reply.has_error())
        return reply

    def _reply(self, first: str, coming: Sequence[str]) -> Message:
        """The computed reply of a flight; computing it begins with those that follow it."""
        if first not in self._computed:
            batch = [i for i in coming if i not in self._computed and self._flights[i].visit.failure is None]
            ids = self._deferred.push([self._flights[i].message for i in batch], timeout=None)
            self._computed |= dict(zip(batch, ids, strict=True))
            (reply,) = self._deferred.pull(ids, needed=len(ids))
        else:
            (reply,) = self._deferred.pull([self._computed[first]], needed=1)
        return answering(reply, first)

    def _forget(self, message_id: str, flight: _Flight) -> None:
        self._clock.landed(flight.asked)
        computed = self._computed.pop(message_id, None)
        if computed is not None:
            self._deferred.cancel([computed])


def _places(grid: Grid, names: Sequence[str]) -> Callable[[int], int]:
    """Finds a node's place; without a table of all, where nodes are numbered in the order of the names."""
    nodes = grid.get_node_ids()
    if isinstance(nodes, range) and nodes == range(FIRST_NODE, FIRST_NODE + len(names)):
        return lambda node: node - FIRST_NODE
    places = {name: place for place, name in enumerate(names)}
    return {node.node_id: places[node.name] for node in grid.get_nodes()}.__getitem__


def _round_of(message: Message) -> int:
    """The round that a message asks for; 0 where it does not say."""
    try:
        said = config_of(message.content).get(ROUND)
    except KeyError:
        return 0
    return said if isinstance(said, int) else 0
