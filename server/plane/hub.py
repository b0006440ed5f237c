"""The meeting point of runs and sites: who is attached, and which orders go where. It knows no network.

Runs use `send`, `cancel`, `attached` and `wait_attached`, from any thread; the rest is the gRPC service's side. Nothing
here outlasts the process: after a restart the coordinator makes its orders again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Protocol

from common.disk import acquire_lock, disk_errors
from common.errors import FailureCode
from common.transport import wire, wire_pb2
from common.transport.wire import Refusal
from server.plane.book import OrderBook
from server.plane.faults import log_fault
from server.plane.orders import Answer, Attachment, Delivery, Event, Failed, Kind, Observer, Order
from server.plane.refusals import RefusedCallError
from server.plane.uploads import Uploads

MISSED: Final = 3
"""Heartbeats without which a site counts as gone."""
_STATES: Final = ("idle", "fetching", "working", "sending")


class Session(Protocol):
    """One attached agent's stream. Neither method blocks; both may be called from any thread."""

    def post(self, event: wire_pb2.ServerEvent) -> None:
        """Send an event after all before it."""
        ...

    def close(self, refusal: Refusal) -> None:
        """End the stream."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attached:
    session: Session
    instance: bytes
    facts: Attachment


class Hub:
    """Orders down, results up. An order for a site that is not attached waits; see `OrderBook` for what is promised."""

    def __init__(
        self,
        folder: Path,
        *,
        observe: Observer = lambda _event: None,
        heartbeat_seconds: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a folder for this process alone, and remove what a former process left there.

        Raises:
            RunError: Another process uses the folder, or it cannot be written.
        """
        self.heartbeat_seconds = heartbeat_seconds
        self.blobs, uploads = folder / "blobs", folder / "uploads"
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder_lock = acquire_lock(folder / "lock")
            for path in (self.blobs, uploads):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(mode=0o700, exist_ok=True)
        self.uploads = Uploads(uploads)
        self._observe, self._clock, self._version = observe, clock, metadata.version("coterie")
        self.book = OrderBook(note=self.note, clock=clock)
        self._changed = threading.Condition(threading.RLock())
        """Held while an order is entered and sent, or a site attached: no order is sent twice on a stream, or never."""
        self._attached: dict[str, _Attached] = {}
        self._shut_out: frozenset[str] = frozenset()

    def close(self) -> None:
        """Let go of the folder. Nothing else may be called after this."""
        with self._changed:
            if self._folder_lock >= 0:
                os.close(self._folder_lock)
                self._folder_lock = -1

    def send(self, order: Order, delivery: Delivery) -> None:
        """Open an order; it is sent now, or as soon as its site attaches. A site that is shut out is lost at once.

        Raises:
            ValueError: The message id is that of another order.
        """
        with self._changed:
            self.book.open(order, delivery)
            lost = order.site in self._shut_out
            attached = None if lost else self._attached.get(order.site)
            if attached is not None:
                attached.session.post(self.book.event(order))
        if lost:
            self._lose(order)
        elif attached is not None:
            self.note("order-sent", order.site, order.message_id)

    def cancel(self, message_id: bytes) -> None:
        """Nobody waits for this order any more. Does nothing to one that is closed.

        Guarantee: no result of it is delivered afterwards, but one that another thread is delivering at this moment.
        """
        order = self.book.cancel(message_id)
        if order is not None:
            self.uploads.drop(message_id)
            self._post(order.site, self.book.farewell(order.site, message_id))

    def attached(self) -> dict[str, Attachment]:
        """The sites that are attached now, by name."""
        waiting = Counter(self.book.waiting())
        with self._changed:
            attached = sorted(self._attached.items())
        return {name: replace(one.facts, open_orders=waiting[name]) for name, one in attached}

    def wait_attached(self, sites: Iterable[str], *, timeout: float | None = None) -> bool:
        """Wait until all these sites are attached at once; whether they are."""
        wanted = set(sites)
        with self._changed:
            return self._changed.wait_for(lambda: wanted <= self._attached.keys(), timeout)

    def attach(self, site: str, hello: wire_pb2.Hello, session: Session) -> None:
        """Take a site's stream, and send it what it must know.

        A process may replace its own stream, which a cut link can leave half open. Another process under the same
        identity waits until the first has been silent for `MISSED` heartbeats: two that took turns would lose work.

        Raises:
            RefusedCallError: `attached-elsewhere`, or `denied`.
        """
        now, held = self._clock(), frozenset(hello.held)
        with self._changed:
            if site in self._shut_out:
                raise RefusedCallError(Refusal.DENIED)
            before = self._attached.get(site)
            silent = before is None or now - before.facts.heard > MISSED * self.heartbeat_seconds
            if before is not None and before.instance != hello.instance and not silent:
                raise RefusedCallError(Refusal.ATTACHED_ELSEWHERE)
            facts = Attachment(
                site=site,
                since=time.time(),
                heard=now,
                version=hello.version,
                state="idle",
                working_on=b"",
                open_orders=0,
            )
            self._attached[site] = _Attached(session=session, instance=hello.instance, facts=facts)
            session.post(wire_pb2.ServerEvent(welcome=self._welcome()))
            orders = self.book.of_site(site)
            for message_id in held.difference(order.message_id for order in orders):
                session.post(self.book.farewell(site, message_id))
            sent = [order for order in orders if order.message_id not in held]
            for order in sent:
                session.post(self.book.event(order))
            self._changed.notify_all()
        if before is not None:
            before.session.close(Refusal.SUPERSEDED)
        self.note("attached", site)
        for order in sent:
            self.note("order-sent", site, order.message_id)

    def detach(self, site: str, session: Session) -> None:
        """A site's stream has ended; its orders stay open."""
        with self._changed:
            attached = self._attached.get(site)
            if attached is None or attached.session is not session:
                return  # it was replaced
            del self._attached[site]
            self._changed.notify_all()
        self.note("detached", site)

    def heard(self, site: str, session: Session, heartbeat: wire_pb2.Heartbeat | None = None) -> None:
        """A site is alive, and may tell what it does.

        Raises:
            RefusedCallError: It says what no agent says.
        """
        changes: dict[str, Any] = {"heard": self._clock()}
        if heartbeat is not None:
            if heartbeat.state not in _STATES or len(heartbeat.working_on) not in {0, wire.ID_BYTES}:
                raise RefusedCallError(Refusal.MALFORMED)
            changes |= {"state": heartbeat.state, "working_on": heartbeat.working_on}
        with self._changed:
            attached = self._attached.get(site)
            if attached is not None and attached.session is session:
                self._attached[site] = replace(attached, facts=replace(attached.facts, **changes))

    def failed(self, site: str, message_id: bytes, code: int) -> None:
        """A site has no update for an order. A code that is not known counts as a failed client."""
        try:
            failure = FailureCode(code)
        except ValueError:
            failure = FailureCode.CLIENT_FAILED
        if self.book.settle(Failed(message_id=message_id, site=site, failure=failure)):
            self.uploads.drop(message_id)
        self._post(site, self.book.farewell(site, message_id))

    def answered(self, answer: Answer) -> None:
        """A site's update is complete and on the disk.

        Raises:
            RefusedCallError: Nobody waits for it; its file is removed.
        """
        taken = self.book.settle(answer)
        self._post(answer.site, self.book.farewell(answer.site, answer.message_id))
        if not taken:
            answer.path.unlink(missing_ok=True)
            raise RefusedCallError(Refusal.UNKNOWN_ORDER)

    def shut_out(self, sites: Iterable[str]) -> None:
        """From now on exactly these sites are not let in, and nothing is expected of them."""
        with self._changed:
            new = frozenset(sites) - self._shut_out
            self._shut_out = frozenset(sites)
        for site in sorted(new):
            self.give_up(site)

    def give_up(self, site: str) -> None:
        """End a site's stream; all that is open for it fails."""
        with self._changed:
            attached = self._attached.get(site)
        if attached is not None:
            attached.session.close(Refusal.DENIED)
        for order in self.book.of_site(site):
            self._lose(order)

    def note(self, kind: Kind, party: str, message_id: bytes = b"", detail: str = "") -> None:
        """Tell the observer. Its faults are logged: they must not leave an order half closed."""
        try:
            self._observe(Event(kind=kind, party=party, message_id=message_id, detail=detail))
        except Exception as e:  # noqa: BLE001 - see above
            log_fault("plane_event_not_observed", e, kind=kind, party=party)

    def _lose(self, order: Order) -> None:
        self.book.settle(Failed(message_id=order.message_id, site=order.site, failure=FailureCode.CLIENT_LOST))
        self.uploads.drop(order.message_id)

    def _post(self, site: str, event: wire_pb2.ServerEvent) -> None:
        with self._changed:
            attached = self._attached.get(site)
            if attached is not None:
                attached.session.post(event)

    def _welcome(self) -> wire_pb2.Welcome:
        return wire_pb2.Welcome(protocol=wire.PROTOCOL, heartbeat_seconds=self.heartbeat_seconds, version=self._version)
