"""Brings stored updates to the coordinator, one after the other, until it says that it has them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import structlog

from client.connection import Connection
from client.outbox import Outbox
from client.transfer import UnwantedError, send_update

log = structlog.get_logger()


class Sender:
    """Sends what is in the outbox.

    Guarantee: an update leaves the outbox by its receipt, or where nobody wants it; never because it was sent.
    """

    def __init__(self, connection: Connection, outbox: Outbox, *, changed: Callable[[], None]) -> None:
        """Begin with what a former process left.

        Args:
            connection: Where to send.
            outbox: What to send.
            changed: Told whenever there may be less to send.
        """
        self._connection, self._outbox, self._changed = connection, outbox, changed
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sent: set[bytes] = set()
        self._closed = False
        self.sending = b""
        """Message id of what is being sent, or empty."""
        for message_id in outbox:
            self._waiting.put(message_id)

    def put(self, message_id: bytes) -> None:
        """Send this update, too."""
        self._waiting.put(message_id)

    def attached(self) -> None:
        """Look again at what was sent on a former connection and has no receipt yet."""
        with self._lock:
            again = sorted(self._sent)
            self._sent.clear()
        for message_id in again:
            self._waiting.put(message_id)

    def forget(self, message_id: bytes) -> None:
        """Remove an update: it has arrived, or nobody wants it."""
        with self._lock:
            self._sent.discard(message_id)
        self._outbox.drop(message_id)
        self._connection.wake()
        self._changed()

    def close(self) -> None:
        """End `run`; what is left stays in the outbox."""
        self._closed = True
        self._waiting.put(None)
        self._connection.wake()

    def run(self) -> None:
        """Send until it is closed."""
        while (message_id := self._waiting.get()) is not None:
            self.sending = message_id
            self._send(message_id)
            self.sending = b""

    def _send(self, message_id: bytes) -> None:
        update = self._outbox.get(message_id)
        if update is None:
            return
        try:
            send_update(
                self._connection,
                update,
                wanted=lambda: self._outbox.get(message_id) is not None and not self._closed,
            )
        except UnwantedError:
            if not self._closed:
                log.info("update_not_wanted", order=message_id.hex())
                self.forget(message_id)
            return
        with self._lock:
            if self._outbox.get(message_id) is not None:
                self._sent.add(message_id)  # until its receipt
