"""One round of secure aggregation: masked updates in, one reply for each sum that could be opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import structlog
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from common.errors import FailureCode
from common.flower import failure_reply
from common.secagg.fixed_point import Decoded
from server.grids.base import WrappingGrid
from server.grids.mean_reply import no_single_replies
from server.secagg.set_up import SetUp
from server.secagg.steps import Heard, Step, hear, steps_alone, with_steps
from server.secagg.sums import Sum

log = structlog.get_logger()

_TRIES: Final = 2
"""How often members are asked to agree, and to unmask: one that was away for a moment answers the same bytes later."""


class SecAggGrid(WrappingGrid):
    """Answers a strategy with one reply for each group: the model plus the mean of its members' updates.

    Three trips: train, agree on the survivors, unmask. Masked updates are added while they arrive.

    Guarantee:
        Nobody's update is seen, but in a sum that its group agreed on. Every client that is asked has one fate, told
        once: None if its update is in a sum that was opened, else why not; whatever it sends is a typed failure of its
        own. Sums are handed to `keep` before anybody sees one of them. Failed replies pass through as they arrive.
        There is one accumulator a group in memory, and one masked update.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        sums: Sequence[Sum],
        nodes: Mapping[str, int],
        record: ConfigRecord,
        tell: Callable[[str, FailureCode | None], None],
        keep: Callable[[], None],
        reply: Callable[[Decoded, Message], Message],
        riding: SetUp,
        arrived: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """Prepare one round.

        Args:
            inner: A transport's grid.
            sums: The round, begun in every group.
            nodes: Node ids of the clients, by name.
            record: The configuration of every message of the round.
            tell: Told of each client's fate.
            keep: Called once, when all is known that can be, if a sum was opened.
            reply: What a strategy is shown of an opened sum, as an answer to a message.
            riding: The next epoch's set-up, whose steps go with the round's.
            arrived: Told of each masked update, whose fate is not known yet.
        """
        super().__init__(inner)
        self._sums = sums
        self._of = {name: each for each in sums for name in each.round.participants}
        self._nodes, self._names = nodes, {node: name for name, node in nodes.items()}
        self._record = record
        self._tell, self._keep, self._reply = tell, keep, reply
        self._riding, self._arrived = riding, arrived

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Failures as they arrive, then one reply for each sum, and failures for the members of the others."""
        asked = {self._names[message.metadata.dst_node_id]: message for message in messages}
        for name, failure in self._train(asked, timeout):
            self._tell(name, failure)
            yield failure_reply(asked[name], failure)
        self._agree(timeout)
        self._unmask(timeout)
        for each in self._sums:
            each.open()
            for name in each.round.survivors:
                self._tell(name, None if each.opened else FailureCode.AGGREGATION_ABORTED)
        if any(each.opened for each in self._sums):
            self._keep()
        for each in self._sums:
            survivors = sorted(each.round.survivors)
            if each.decoded is not None:
                if each.decoded.weight > 0:  # else nobody had an example
                    yield self._reply(each.decoded, asked[survivors[0]])
            else:
                log.warning("sum_not_opened", group=each.group.index, reason=each.refused, survivors=len(survivors))
                yield from (failure_reply(asked[name], FailureCode.AGGREGATION_ABORTED) for name in survivors)

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:  # noqa: ARG002
        """Refused: single replies are masked."""
        raise no_single_replies("under secure aggregation")

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:  # noqa: ARG002
        """Refused, as `push_messages` is."""
        raise no_single_replies("under secure aggregation")

    def _train(self, asked: Mapping[str, Message], timeout: float | None) -> Iterator[tuple[str, FailureCode]]:
        """The first trip; whose updates do not count, and why."""
        steps = {name: step for each in self._sums for name, step in each.round.requests().items() if name in asked}
        for heard in self._ask(steps, timeout, beside=asked):
            each, failure = self._of[heard.name], heard.failure
            if failure is None:
                failure = each.add(heard)
            if failure is FailureCode.NOT_IN_EPOCH:
                each.group.live.discard(heard.name)
            if failure is None:
                self._arrived(heard.name)
            else:
                yield heard.name, failure
            del heard  # or its update stays in memory while the next one arrives

    def _agree(self, timeout: float | None) -> None:
        """The second trip: survivors sign who they are."""
        requests = {each: request for each in self._sums if (request := each.agree()) is not None}
        for _ in range(_TRIES):
            steps = {
                name: request
                for each, request in requests.items()
                if not each.round.agreed
                for name in each.round.survivors
                if name not in each.round.signers
            }
            self._tell_each(steps, timeout, Sum.state)
        for each in requests:
            if not each.round.agreed:
                each.refused = "quorum"

    def _unmask(self, timeout: float | None) -> None:
        """The third trip: those who signed release shares."""
        requests = {each: each.round.unmask() for each in self._sums if not each.refused}
        released: set[str] = set()
        for _ in range(_TRIES):
            steps = {
                name: request
                for each, request in requests.items()
                if not each.round.ready
                for name in each.round.signers
                if name not in released
            }
            released |= self._tell_each(steps, timeout, Sum.release)

    def _tell_each(
        self, steps: Mapping[str, bytes], timeout: float | None, take: Callable[[Sum, Heard], bool]
    ) -> set[str]:
        """One trip; who answered it as it should."""
        if not steps:
            return set()
        return {heard.name for heard in self._ask(steps, timeout) if take(self._of[heard.name], heard)}

    def _ask(
        self, steps: Mapping[str, bytes], timeout: float | None, *, beside: Mapping[str, Message] | None = None
    ) -> Iterator[Heard]:
        """One trip: what members answer to a step of the round. The riding set-up takes one of its own with it."""
        setup = self._riding.requests()
        both = {name: Step(round=steps.get(name), setup=setup.get(name)) for name in sorted({*steps, *setup})}
        carried = {name: message for name, message in (beside or {}).items() if name in steps}
        alone = {name: step for name, step in both.items() if name not in carried}
        messages = [
            *with_steps(carried, both),
            *steps_alone(alone, nodes=self._nodes, record=self._record),
        ]
        for heard in hear(self._inner, messages, names=self._names, timeout=timeout):
            self._riding.take(heard)
            if heard.name in steps:
                yield heard
            del heard
        self._riding.close()
