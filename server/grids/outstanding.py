"""Messages whose replies are outstanding while their sender does something else: send now, take replies when they come.

Flower's grids have `push_messages` and `pull_messages` for that. Ours add how long a client may take, how many replies
are needed, and a way to stop waiting; these functions use what a grid has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from common.flower import answering

Stream = Callable[[Sequence[Message], float | None], Iterator[Message]]
"""Answers messages to different nodes, each with one reply, in any order; the number is how many seconds each client
may take."""


@runtime_checkable
class OutstandingGrid(Protocol):
    """What our grids promise beyond Flower's.

    Guarantee: a message that was pushed has exactly one reply, a failure perhaps, which is pulled once; or none, where
    it was cancelled before.
    """

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Send messages; one id for each, in their order. Who has not answered after `timeout` seconds failed."""

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        """Replies that are there, one at a time perhaps; waits about half a second for the first.

        What lies behind a reply may go with the next call: read it before.

        Args:
            message_ids: Whose; others are not looked at.
            needed: So many will be taken before anything else happens. A grid that computes replies may compute so many
                of them side by side, and never more.
        """

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """Wait no more for these; nothing happens to one that is not outstanding."""


def push(grid: Grid, messages: Sequence[Message], *, timeout: float | None = None) -> list[str]:
    """Send messages; one id for each, in their order, empty where the grid refused it."""
    if isinstance(grid, OutstandingGrid):
        return grid.push_messages(messages, timeout=timeout)
    ids = [message_id or "" for message_id in grid.push_messages(messages)]
    return ids + [""] * (len(messages) - len(ids))  # Flower gives none where a request was too large


def pull(grid: Grid, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
    """Replies that are there; Flower's own grids do not wait for one."""
    if isinstance(grid, OutstandingGrid):
        return grid.pull_messages(message_ids, needed=needed)
    return list(grid.pull_messages(message_ids))


def cancel(grid: Grid, message_ids: Iterable[str]) -> None:
    """Wait no more for these; Flower's own grids cannot be told."""
    if isinstance(grid, OutstandingGrid):
        grid.cancel_messages(message_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    """A message that nobody works on yet."""

    message: Message
    timeout: float | None


class Deferred:
    """Has messages answered only when their replies are asked for, in the order in which they were sent.

    For grids that compute replies themselves: nothing happens in the background, and what comes next depends neither on
    time nor on the number of workers.

    Guarantee: replies come in the order of the messages, of those that are asked for. Where it is said how many are
    needed not more are computed, and they come one by one.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._numbers = count(1)
        self._waiting: dict[str, _Waiting] = {}
        self._order: deque[str] = deque()
        """What is being computed, in the order in which it is given out."""
        self._replies: Generator[tuple[str, Message], None, None] | None = None
        self._early: dict[str, Message] = {}

    def push(self, messages: Iterable[Message], *, timeout: float | None) -> list[str]:
        """Let messages wait; their ids."""
        pushed = {f"d{next(self._numbers)}": _Waiting(message=message, timeout=timeout) for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull(self, message_ids: Iterable[str], *, needed: int | None) -> list[Message]:
        """The next reply; all, where it is not said how many are needed. None of messages that are not there."""
        wanted = list(message_ids)
        if needed is not None:
            reply = self._next(set(wanted), needed)
            return [] if reply is None else [reply]
        replies = []
        while (reply := self._next(set(wanted), len(wanted))) is not None:
            replies.append(reply)
        return replies

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget messages; what was computed of them is dropped."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)
            self._early.pop(message_id, None)
            if message_id in self._order:
                self._order.remove(message_id)
        if not self._order and self._replies is not None:
            self._replies.close()
            self._replies = None

    def _next(self, wanted: set[str], needed: int) -> Message | None:
        """The reply to the oldest message of these."""
        if not any(message_id in wanted for message_id in self._order):
            self._begin([message_id for message_id in self._waiting if message_id in wanted], needed)
        for message_id in self._order:
            if message_id in wanted:
                self._order.remove(message_id)
                return self._reply(message_id)
        return None

    def _begin(self, oldest: Sequence[str], needed: int) -> None:
        """Have the oldest of these computed: so many, each to another node, and all with the same time-out."""
        batch: dict[int, str] = {}
        messages: list[Message] = []
        timeout = self._waiting[oldest[0]].timeout if oldest else None
        for message_id in oldest[:needed]:
            waiting = self._waiting[message_id]
            node = waiting.message.metadata.dst_node_id
            if node in batch or waiting.timeout != timeout:
                break
            batch[node] = message_id
            messages.append(waiting.message)
        for message_id in batch.values():
            del self._waiting[message_id]
        self._finish()
        self._order.extend(batch.values())
        self._replies = self._computed(messages, timeout, batch)

    def _computed(
        self, messages: Sequence[Message], timeout: float | None, ids: dict[int, str]
    ) -> Generator[tuple[str, Message], None, None]:
        for reply in self._stream(messages, timeout):
            message_id = ids[reply.metadata.src_node_id]
            yield message_id, answering(reply, message_id)
            del reply  # or it stays in memory while the next one is computed

    def _reply(self, message_id: str) -> Message:
        """Take replies until this one is there."""
        while message_id not in self._early and self._replies is not None:
            found = next(self._replies, None)
            if found is None:
                raise RuntimeError("a message was not answered")
            if found[0] == message_id:
                return found[1]
            if found[0] in self._order:  # else it was cancelled
                self._early[found[0]] = found[1]
        return self._early.pop(message_id)

    def _finish(self) -> None:
        """Take what is still being computed for messages that are not asked for now."""
        if self._replies is not None:
            self._early |= {message_id: reply for message_id, reply in self._replies if message_id in self._order}
            self._replies = None
