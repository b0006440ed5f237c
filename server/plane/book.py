"""The book of orders: which are open, how closed ones ended, and what to tell a site of each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from common.errors import FailureCode
from common.transport import wire_pb2
from common.transport.wire import Refusal
from server.plane.orders import Answer, Delivery, Failed, Kind, Order, Result
from server.plane.refusals import RefusedCallError

MOST_CLOSED: Final = 10_000
"""Closed orders that are remembered, so that an update that comes late, or twice, is known as such."""

Note = Callable[[Kind, str, bytes, str], None]
"""Told what happened: kind, party, message id, detail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Open:
    order: Order
    delivery: Delivery


@dataclass(frozen=True, kw_only=True, slots=True)
class _Closed:
    """An order that nobody waits for.

    Attributes:
        site: Whose it was.
        size: Bytes of the update that was received, 0 for a failure; None where neither was waited for any more.
        late: Told when something comes nevertheless; None after that.
    """

    site: str
    size: int | None
    late: Callable[[str, bytes], None] | None


class OrderBook:
    """Orders by message id; thread-safe.

    Guarantee: an order has exactly one result, unless it is cancelled before: the first of its site's update and its
    site's failure, or DEADLINE_EXCEEDED where those come too late. What another site says of it changes nothing, and
    sounds to that site as if there were no such order.
    """

    def __init__(self, *, note: Note, clock: Callable[[], float]) -> None:
        self._note, self._clock = note, clock
        self._lock = threading.Lock()
        self._open: dict[bytes, _Open] = {}
        self._closed: OrderedDict[bytes, _Closed] = OrderedDict()

    def open(self, order: Order, delivery: Delivery) -> None:
        """Enter an order.

        Raises:
            ValueError: The message id is that of another order.
        """
        with self._lock:
            if order.message_id in self._open or order.message_id in self._closed:
                raise ValueError("an order with this message id exists")
            self._open[order.message_id] = _Open(order=order, delivery=delivery)

    def cancel(self, message_id: bytes) -> Order | None:
        """Close an order without a result; None if it was closed."""
        with self._lock:
            opened = self._open.get(message_id)
            if opened is not None:
                self._shut(opened, size=None)
        return opened.order if opened else None

    def of_site(self, site: str) -> list[Order]:
        """The open orders of a site, oldest first."""
        with self._lock:
            return [opened.order for opened in self._open.values() if opened.order.site == site]

    def waiting(self) -> Iterator[str]:
        """The site of every open order."""
        with self._lock:
            return iter([opened.order.site for opened in self._open.values()])

    def settle(self, result: Result) -> bool:
        """Close an order with its result; whether it was open, and in time."""
        with self._lock:
            opened = self._open.get(result.message_id)
            if opened is not None and opened.order.site != result.site:
                opened = None
            in_time = False
            if opened is not None:
                deadline = opened.order.deadline
                in_time = deadline is None or self._clock() <= deadline
                self._shut(opened, size=_size(result) if in_time else None)
        if opened is not None and in_time:
            self._note_result(result)
            opened.delivery.result(result)
            return True
        if opened is not None:
            failure = FailureCode.DEADLINE_EXCEEDED
            opened.delivery.result(Failed(message_id=result.message_id, site=result.site, failure=failure))
        self._tell_late(result.site, result.message_id)
        return False

    def awaited(self, site: str, message_id: bytes) -> Order | int:
        """The open order that an update would answer; or the size of the update that has come already.

        Raises:
            RefusedCallError: `unknown-order`: it is another site's, was cancelled, or never existed.
        """
        with self._lock:
            opened = self._open.get(message_id)
            size = self._received(site, message_id)
        if opened is not None and opened.order.site == site:
            return opened.order
        if size is not None:
            return size
        self._tell_late(site, message_id)
        raise RefusedCallError(Refusal.UNKNOWN_ORDER)

    def fetchable(self, site: str, digest: bytes) -> Order:
        """An open order of this site with this blob.

        Raises:
            RefusedCallError: `unknown-blob`, also where it is there for others.
        """
        for order in self.of_site(site):
            if order.blob_digest == digest:
                return order
        raise RefusedCallError(Refusal.UNKNOWN_BLOB)

    def farewell(self, site: str, message_id: bytes) -> wire_pb2.ServerEvent:
        """What a site hears of an order that is not open: something was received, or nobody waits."""
        with self._lock:
            size = self._received(site, message_id)
        if size is not None:
            return wire_pb2.ServerEvent(receipt=wire_pb2.Receipt(message_id=message_id))
        return wire_pb2.ServerEvent(cancel=wire_pb2.Cancel(message_id=message_id))

    def event(self, order: Order) -> wire_pb2.ServerEvent:
        """An order as it is sent now."""
        left = 0.0 if order.deadline is None else max(order.deadline - self._clock(), 0.001)
        return wire_pb2.ServerEvent(
            order=wire_pb2.Order(
                message_id=order.message_id,
                kind=order.kind,
                envelope=order.envelope,
                blob_digest=order.blob_digest,
                blob_bytes=order.blob_bytes,
                seconds_left=left,
            )
        )

    def _received(self, site: str, message_id: bytes) -> int | None:
        closed = self._closed.get(message_id)
        return closed.size if closed is not None and closed.site == site else None

    def _shut(self, opened: _Open, *, size: int | None) -> None:
        order = opened.order
        del self._open[order.message_id]
        self._closed[order.message_id] = _Closed(site=order.site, size=size, late=opened.delivery.late)
        if len(self._closed) > MOST_CLOSED:
            self._closed.popitem(last=False)

    def _tell_late(self, site: str, message_id: bytes) -> None:
        """Report what comes for an order that nobody waits for, once."""
        with self._lock:
            closed = self._closed.get(message_id)
            if closed is None or closed.site != site or closed.size is not None or closed.late is None:
                return
            self._closed[message_id] = replace(closed, late=None)
        self._note("late", site, message_id, "")
        closed.late(site, message_id)

    def _note_result(self, result: Result) -> None:
        if isinstance(result, Answer):
            self._note("answer-received", result.site, result.message_id, str(result.size))
        else:
            self._note("failure-received", result.site, result.message_id, result.failure.slug)


def _size(result: Result) -> int:
    return result.size if isinstance(result, Answer) else 0
