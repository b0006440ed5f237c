"""Orders of a run that stay open between two questions for their answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Message

from common.errors import FailureCode
from common.flower import failure_reply, stamp
from common.transport.sealed import Blob, sealed_content
from server.grids.posting import Posting
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Failed, Order, Result

WAIT_SECONDS: Final = 0.5
"""How long a question waits where nothing has come yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Open:
    """An order that was sent, and what its answer belongs to."""

    message: Message
    deadline: float | None
    posting: Posting


class OpenOrders:
    """Sends orders, and keeps what comes until it is asked for: answers as files, in the order of their arrival.

    Guarantee: an order has one result, which is taken once; or none, where it was cancelled. One that has not come by
    its deadline failed, and its site is told to stop. What came in time counts, however late it is taken.
    """

    def __init__(self, hub: Hub, *, on_late: Callable[[str], None], check: Callable[[], None]) -> None:
        """None yet.

        Args:
            hub: Where sites are attached.
            on_late: Told the name of a site whose update came when nobody waited for it any more; from any thread.
            check: Called at least once a second while somebody waits; what it raises ends the waiting.
        """
        self._hub, self._check = hub, check
        self._delivery = Delivery(result=self._take, late=lambda site, _id: on_late(site))
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        """By message id in hexadecimal; changed under the lock."""
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._arrived: dict[str, Result] = {}
        self._shown: Path | None = None
        """What the reply that was given out last is read from."""

    def push(self, messages: Sequence[tuple[Message, str]], *, run_id: bytes, timeout: float | None) -> list[str]:
        """Send messages to sites; their ids.

        Raises:
            RefusedError: A message is not sealed, or of another run. Nothing was sent.
            RunError: The disk is full or cannot be written. What was sent is cancelled.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        posting = Posting(self._hub)
        try:
            orders = [posting.order(message, site=site, run_id=run_id, deadline=deadline) for message, site in messages]
        except BaseException:
            posting.close()
            raise
        ids = [order.message_id.hex() for order in orders]
        try:
            for order, (message, _) in zip(orders, messages, strict=True):
                self._send(order, message, posting)
        except BaseException:
            self.cancel(ids)
            raise
        return ids

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """The reply that came first of these, if there is one; waits a little for it.

        Its ciphertext lies in a file that goes with the next call of anything here.
        """
        self._hide()
        wanted = {message_id: None for message_id in message_ids if message_id in self._open}
        for waits in (True, False):
            self._check()
            self._drain()
            found = next((message_id for message_id in self._arrived if message_id in wanted), None)
            if found is not None:
                return [self._reply(found)]
            late = next((message_id for message_id in wanted if self._left(message_id) == 0), None)
            if late is not None:
                message = self._open[late].message
                self.cancel([late])
                return [failure_reply(message, FailureCode.DEADLINE_EXCEEDED)]
            if waits and wanted:
                self._wait(min(self._left(message_id) for message_id in wanted))
        return []

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Close what is open of these, and remove what has come of them."""
        self._hide()
        for message_id in message_ids:
            if message_id in self._open:
                self._forget(message_id)
                self._hub.cancel(bytes.fromhex(message_id))
                _remove(self._arrived.pop(message_id, None))
        self._drain()

    def _send(self, order: Order, message: Message, posting: Posting) -> None:
        message_id = order.message_id.hex()
        stamped = stamp(message, message_id=message_id)
        with self._lock:
            self._open[message_id] = _Open(message=stamped, deadline=order.deadline, posting=posting)
        try:
            self._hub.send(order, self._delivery)
        except BaseException:
            self._forget(message_id)
            raise

    def _take(self, result: Result) -> None:
        """Keep a result, in the plane's thread."""
        with self._lock:
            if result.message_id.hex() in self._open:
                self._results.put(result)
                return
        _remove(result)

    def _drain(self) -> None:
        """Sort what has come."""
        with suppress(queue.Empty):
            while True:
                self._sort(self._results.get_nowait())

    def _wait(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self._sort(self._results.get(timeout=max(0.001, min(seconds, WAIT_SECONDS))))

    def _sort(self, result: Result) -> None:
        if result.message_id.hex() in self._open:
            self._arrived[result.message_id.hex()] = result
        else:  # it was cancelled meanwhile
            _remove(result)

    def _left(self, message_id: str) -> float:
        """Seconds that an order still has."""
        deadline = self._open[message_id].deadline
        return WAIT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())

    def _reply(self, message_id: str) -> Message:
        message, result = self._open[message_id].message, self._arrived.pop(message_id)
        self._forget(message_id)
        if isinstance(result, Failed):
            return failure_reply(message, result.failure)
        self._shown = result.path
        content = sealed_content(result.envelope, Blob.of_file(result.path, result.size))
        return Message(content, reply_to=message)

    def _forget(self, message_id: str) -> None:
        with self._lock:
            posting = self._open.pop(message_id).posting
        if all(each.posting is not posting for each in self._open.values()):
            posting.close()

    def _hide(self) -> None:
        if self._shown is not None:
            self._shown.unlink(missing_ok=True)
            self._shown = None


def _remove(result: Result | None) -> None:
    """Nobody takes this result."""
    if isinstance(result, Answer):
        result.path.unlink(missing_ok=True)
