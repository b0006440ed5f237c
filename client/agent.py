"""A site's long-lived process: takes orders one at a time, keeps model and data warm between them, and loses nothing.

Three threads: the connection hears orders, the worker answers them, the sender brings updates to the coordinator. An
update is on the disk before its first byte is sent, and stays there until the coordinator says that it has it.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
from flwr.clientapp.typing import ClientAppCallable

from client.connection import CallRefusedError, Connection, Patience, refusals
from client.orders import Orders
from client.outbox import Outbox
from client.replays import Replays
from client.resources import SPOOL, SiteResources
from client.run_state import RunStates
from client.sender import Sender
from client.site_app import make_site_app
from client.worker import Worker
from common.crypto import open_envelope
from common.disk import disk_errors
from common.errors import CoterieError
from common.flower import prepare_process
from common.kit import Kit
from common.renewal import is_due, renew
from common.transport import wire_pb2
from common.transport.wire import ID_BYTES, MOST_ENVELOPE_BYTES, MOST_HELD

log = structlog.get_logger()

INBOX, OUTBOX, SEALING, SEEN, STATES = "inbox", "outbox", "sealing", "seen", "runs"
"""Folders in a site's state."""

_STALE_SECONDS: Final = 86_400.0
_LOOK_SECONDS: Final = 3600.0
"""Between two looks at the certificate."""


class Agent:
    """Answers a coordinator's orders with a ClientApp.

    Guarantee: an order is worked on at most once by a process, however often it is delivered. Updates are kept until
    their receipt, over restarts, and always sent with the same bytes. An order that fails ends with a typed failure.
    """

    def __init__(
        self,
        kit: Kit,
        app: ClientAppCallable,
        *,
        replays: Replays | None = None,
        patience: Patience | None = None,
        wait: bool = True,
        most_bytes: int = 16 << 30,
    ) -> None:
        """Prepare, and take up what a former process left to be sent.

        Args:
            kit: The site's kit.
            app: Answers sealed messages with sealed messages or with errors.
            replays: Where the app writes down which orders it has taken; None if it does not.
            patience: How long to wait between attempts to connect.
            wait: Whether to wait for a coordinator that cannot be reached at first.
            most_bytes: Longest blob that is fetched.

        Raises:
            RunError: The state folder cannot be written.
        """
        prepare_process()
        self._kit = kit
        inbox = kit.state / INBOX
        with disk_errors(inbox):
            inbox.mkdir(mode=0o700, exist_ok=True)
            _remove_stale(inbox, older_than=_STALE_SECONDS)
        self.outbox = Outbox(kit.state / OUTBOX)
        self._orders = Orders()
        self._connection = Connection(kit, self, patience=patience, wait=wait)
        self._sender = Sender(self._connection, self.outbox, changed=self._tell)
        self._worker = Worker(
            app,
            orders=self._orders,
            outbox=self.outbox,
            states=RunStates(kit.state / STATES),
            inbox=inbox,
            replays=replays,
            connection=self._connection,
            ready=self._stored,
            verify=lambda envelope: open_envelope(
                envelope, sender=kit.coordinator, recipient=kit.keys, most_bytes=most_bytes
            ),
            most_bytes=most_bytes,
        )
        self._closed = False
        self._fault: BaseException | None = None
        self._drain_until: float | None = None
        self._look_at_certificate = False
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # a signal's handler may put to it

    def run(self) -> None:
        """Work until `drain`.

        Raises:
            UnreachableError: See `Connection.run`.
            KitError: The certificate cannot be read.
        """
        connection = self._thread("connection", self._connection.run)
        sender = self._thread("sender", self._sender.run)
        self._thread("worker", lambda: self._worker.run(self._ending, lambda: self._closed))
        next_look, told = time.monotonic() + _LOOK_SECONDS, False
        while not self._over():
            if self._drain_until is not None and not told:
                log.info("draining", updates_left=len(self.outbox))
                told = True
            until = min(next_look, self._drain_until or next_look)
            with suppress(queue.Empty):
                self._news.get(timeout=max(0.0, until - time.monotonic()))
            if self._drain_until is None and (self._look_at_certificate or time.monotonic() >= next_look):
                self._look_at_certificate, next_look = False, time.monotonic() + _LOOK_SECONDS
                self._renew()
        self._closed = True
        self._orders.wake()
        self._connection.close()
        self._sender.close()
        connection.join()
        sender.join()
        log.info("client_ended", updates_left=len(self.outbox))
        if self._fault is not None:
            raise self._fault

    def drain(self, grace_seconds: float) -> None:
        """End soon: take no more orders, finish the one at hand, send what is ready, all within the grace.

        What is left then stays on the disk and is sent after the next start. Can be called from a signal's handler.
        """
        self._drain_until = time.monotonic() + grace_seconds
        self._tell()

    @property
    def working(self) -> bool:
        """Whether an order is being worked on; after `run` it is one that outlasted the grace."""
        return self._orders.current() is not None

    def held(self) -> list[bytes]:
        """See `Listener`."""
        return list(dict.fromkeys([*self.outbox, *self._orders.held()]))[:MOST_HELD]

    def status(self) -> tuple[bytes, str]:
        """See `Listener`."""
        task, sending = self._orders.current(), self._sender.sending
        if task is not None:
            return task.message_id, task.stage
        return (sending, "sending") if sending else (b"", "idle")

    def attached(self) -> None:
        """See `Listener`: say again what may have been lost on the way."""
        for message_id, failure in self._orders.failures().items():
            self._connection.tell_failure(message_id, int(failure))
        self._sender.attached()
        self._look_at_certificate = True
        self._tell()

    def ordered(self, order: wire_pb2.Order) -> None:
        """See `Listener`."""
        message_id = order.message_id
        if len(message_id) != ID_BYTES or self._ending() or self.outbox.get(message_id) is not None:
            return
        if len(order.envelope) > MOST_ENVELOPE_BYTES or len(self._orders.held()) >= MOST_HELD:
            return  # no coordinator of ours sends that; what waits is held in memory
        if self._orders.enter(order):
            log.info("order_received", kind=order.kind[:20], order=message_id.hex())

    def cancelled(self, message_id: bytes) -> None:
        """See `Listener`."""
        log.info("order_cancelled", order=message_id.hex())
        self._forget(message_id)

    def received(self, message_id: bytes) -> None:
        """See `Listener`."""
        log.info("receipt", order=message_id.hex())
        self._forget(message_id)

    def _forget(self, message_id: bytes) -> None:
        self._orders.close(message_id)
        self._sender.forget(message_id)

    def _stored(self, message_id: bytes) -> None:
        """An order has ended; with a message id, its update is in the outbox."""
        if message_id:
            self._sender.put(message_id)
        self._tell()

    def _tell(self) -> None:
        self._news.put(None)

    def _ending(self) -> bool:
        return self._closed or self._drain_until is not None

    def _over(self) -> bool:
        if self._fault is not None:
            return True
        if self._drain_until is None:
            return False
        self._orders.wake()  # the worker may wait for an order
        busy = self.working or len(self.outbox) or self._orders.failures()
        return not busy or time.monotonic() >= self._drain_until

    def _renew(self) -> None:
        """Ask for a new certificate where the present one ends soon. A failure is tried again at the next look."""
        try:
            calls = self._connection.calls_now()
            if calls is None or not is_due(self._kit):
                return
            with refusals():
                renew(self._kit, calls)
            log.info("certificate_renewed", valid_until=self._kit.certificate().not_after.isoformat())
        except (CallRefusedError, CoterieError) as e:
            log.warning("certificate_not_renewed", reason=str(e))

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def watched() -> None:
            try:
                target()
            except BaseException as e:  # noqa: BLE001 - raised again by `run`, in the main thread
                self._fault = e
                self._tell()

        thread = threading.Thread(target=watched, name=name, daemon=True)
        thread.start()
        return thread


def make_agent(resources: SiteResources, *, patience: Patience | None = None, wait: bool = True) -> Agent:
    """The agent of a site.

    Raises:
        RunError: The state folder cannot be written.
    """
    state = resources.kit.state
    folder = state / SEALING
    with disk_errors(state):
        shutil.rmtree(folder, ignore_errors=True)  # half-sealed answers of a process that was killed
        longest = resources.policy.limits.longest_run_hours * 3600
        _remove_stale(state / SPOOL, older_than=longest + _STALE_SECONDS)  # of runs that are refused by now
    replays = Replays(state / SEEN)
    app = make_site_app(resources, seen=replays, folder=folder)
    return Agent(resources.kit, app, replays=replays, patience=patience, wait=wait)


def _remove_stale(folder: Path, *, older_than: float) -> None:
    """Remove what nobody will ask for again."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if time.time() - entry.stat().st_mtime > older_than:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
