"""A Flower Grid that reaches sites over the plane. What it carries is sealed: it sees names, sizes and times."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from flwr.app import Message

from common.errors import FailureCode
from common.flower import failure_reply, stamp
from common.transport.sealed import Blob, read_sealed, sealed_content
from server.grids.base import TransportGrid
from server.grids.open_orders import WAIT_SECONDS, OpenOrders
from server.grids.posting import Posting
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Failed, Order, Result


class PlaneGrid(TransportGrid):
    """Sends sealed messages to attached sites, and yields their sealed replies.

    Guarantee: every message has exactly one reply. Failures come at once; sealed replies in the order of the messages,
    whatever the order of arrival, those that are early wait as files. Who has not answered at the time-out, or when
    `enough` updates are there, failed with DEADLINE_EXCEEDED and is told to stop. When a stream ends, for whatever
    reason, nothing of it is open or on the disk any more.

    A sealed reply's file is removed when the next reply is asked for, or the stream is closed. Messages that are pushed
    stay open between questions for their replies, which come in the order of arrival; see `OpenOrders`.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        run_id: bytes,
        sites: Sequence[str],
        enough: int | None = None,
        on_late: Callable[[str], None] = lambda _site: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Reach these sites.

        Args:
            hub: Where they are attached.
            run_id: 16 bytes; messages of another run are refused.
            sites: Names of the sites that the run may ask.
            enough: So many updates end a call. They count when they arrive, before anybody has opened them.
            on_late: Told the name of a site whose update came when nobody waited for it any more; from any thread.
            check: Called at least once a second while a call waits; what it raises ends the call.
        """
        super().__init__(sorted(sites))
        self._hub, self._run_id = hub, run_id
        self._names = {node.node_id: node.name for node in self._nodes}
        self._enough, self._on_late, self._check = enough, on_late, check
        self._outstanding = OpenOrders(hub, on_late=on_late, check=check)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield their replies.

        Raises:
            RefusedError: A message is not sealed, or of another run. Nothing was sent.
            RunError: The disk is full or cannot be written.
            ValueError: A message is for a node that is not there.
        """
        exchange = _Exchange(self._hub, on_late=self._on_late)
        try:
            deadline = None if timeout is None else time.monotonic() + timeout
            for message in messages:
                name = self._names[message.metadata.dst_node_id]
                exchange.add(message, name, run_id=self._run_id, deadline=deadline)
            exchange.send()
            yield from exchange.replies(deadline=deadline, enough=self._enough, check=self._check)
        finally:
            exchange.close()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, with their ciphertext in memory."""
        return [_in_memory(reply) for reply in self.stream(messages, timeout=timeout)]

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Send messages; they stay open until their replies are pulled, or they are cancelled.

        Raises:
            RefusedError: A message is not sealed, or of another run. Nothing was sent.
            RunError: The disk is full or cannot be written.
        """
        named = [(message, self._names[message.metadata.dst_node_id]) for message in messages]
        return self._outstanding.push(named, run_id=self._run_id, timeout=timeout)

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:  # noqa: ARG002
        """The reply that came first; waits up to half a second. Its ciphertext goes with the next call."""
        return self._outstanding.pull(message_ids)

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """Tell sites to stop."""
        self._outstanding.cancel(message_ids)


class _Exchange:
    """The orders of one call, and what became of them."""

    def __init__(self, hub: Hub, *, on_late: Callable[[str], None]) -> None:
        self._hub = hub
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._delivery = Delivery(result=self._take, late=lambda site, _id: on_late(site))
        self._lock, self._closed = threading.Lock(), False
        self._messages: dict[bytes, Message] = {}
        """By message id, in the order in which they are answered."""
        self._orders: list[Order] = []
        self._open: set[bytes] = set()
        self._early: dict[bytes, Answer] = {}
        self._posting = Posting(hub)

    def add(self, message: Message, site: str, *, run_id: bytes, deadline: float | None) -> None:
        """Check a message and make its order."""
        order = self._posting.order(message, site=site, run_id=run_id, deadline=deadline)
        self._messages[order.message_id] = stamp(message, message_id=order.message_id.hex())
        self._orders.append(order)

    def send(self) -> None:
        """Open all orders."""
        for order in self._orders:
            self._hub.send(order, self._delivery)
            self._open.add(order.message_id)
        self._orders.clear()

    def replies(self, *, deadline: float | None, enough: int | None, check: Callable[[], None]) -> Iterator[Message]:
        """One reply a message; see `PlaneGrid`."""
        waiting = list(self._messages)
        arrived = 0
        while self._open:
            check()
            if enough is not None and arrived >= enough:
                break
            result = self._next(deadline)
            if result is None:
                if deadline is not None and time.monotonic() >= deadline:
                    break
                continue
            self._open.discard(result.message_id)
            if isinstance(result, Failed):
                waiting.remove(result.message_id)
                yield failure_reply(self._messages[result.message_id], result.failure)
            else:
                arrived += 1
                self._early[result.message_id] = result
            while waiting and waiting[0] in self._early:
                yield from self._sealed(waiting.pop(0))
        yield from self._rest(waiting)

    def close(self) -> None:
        """Let go of everything."""
        self._cancel()
        for answer in self._early.values():
            answer.path.unlink(missing_ok=True)
        self._early.clear()
        self._posting.close()

    def _take(self, result: Result) -> None:
        """Keep a result, in the plane's thread."""
        with self._lock:
            if not self._closed:
                self._results.put(result)
                return
        if isinstance(result, Answer):
            result.path.unlink(missing_ok=True)

    def _next(self, deadline: float | None) -> Result | None:
        """The next result; None where there is none yet. What is there already counts, however late it is taken."""
        left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, max(0.0, deadline - time.monotonic()))
        try:
            return self._results.get(timeout=left) if left else self._results.get_nowait()
        except queue.Empty:
            return None

    def _rest(self, waiting: list[bytes]) -> Iterator[Message]:
        """What came but stood behind others, and failures for those that nobody waits for any more."""
        self._cancel()
        for message_id in waiting:
            if message_id not in self._early:
                yield failure_reply(self._messages[message_id], FailureCode.DEADLINE_EXCEEDED)
        for message_id in waiting:
            if message_id in self._early:
                yield from self._sealed(message_id)

    def _sealed(self, message_id: bytes) -> Iterator[Message]:
        answer = self._early[message_id]
        content = sealed_content(answer.envelope, Blob.of_file(answer.path, answer.size))
        try:
            yield Message(content, reply_to=self._messages[message_id])
        finally:
            del self._early[message_id]
            answer.path.unlink(missing_ok=True)

    def _cancel(self) -> None:
        """Close what is open, and take what was delivered in the same moment off the disk."""
        with self._lock:
            self._closed = True
        for message_id in self._open:
            self._hub.cancel(message_id)
        self._open.clear()
        with suppress(queue.Empty):
            while True:
                result = self._results.get_nowait()
                if isinstance(result, Answer):
                    result.path.unlink(missing_ok=True)


def _in_memory(reply: Message) -> Message:
    if reply.has_error():
        return reply
    envelope, blob = read_sealed(reply.content)
    with blob.open() as file:
        content = sealed_content(envelope, Blob.of_bytes(file.read()))
    return Message(content, metadata=reply.metadata)  # type: ignore[call-overload,no-any-return]
