"""A run's way to the plane, where all that is asked and that comes back is recorded; and how a run is ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import structlog

from common.crypto import peek
from common.errors import CoterieError
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Order, Result
from server.service.audit import AuditLog
from server.service.board import ASKED, RECEIVED, Board

log = structlog.get_logger()

Reason = Literal["", "operator", "denied", "service"]
_FINAL: Final[frozenset[Reason]] = frozenset({"operator", "denied"})
"""Reasons that outlast a restart."""


class StoppedError(Exception):
    """The run shall not go on: its operator ended it or is shut out, or the service ends."""


class Stop:
    """Tells one run to end. `check` is called wherever nothing is half done, and while a run waits for sites.

    Args:
        denied: Whether the run's operator is shut out by now.
    """

    def __init__(self, denied: Callable[[], bool] = lambda: False) -> None:
        self._reason: Reason = ""
        self._denied = denied

    @property
    def reason(self) -> Reason:
        """Who asked for it; empty while the run goes on."""
        return self._reason

    def request(self, reason: Reason) -> None:
        """End the run soon. What an operator asks for counts more: it outlasts a restart."""
        if self._reason not in _FINAL:
            self._reason = reason

    def check(self) -> None:
        """Go on, unless somebody asked to stop, or the run's operator was shut out.

        Raises:
            StoppedError: So it is.
        """
        if not self._reason and self._denied():
            self._reason = "denied"
        if self._reason:
            raise StoppedError


class RunOrders:
    """The hub as one run sees it: what `PlaneGrid` uses of it.

    Guarantee: an order is in the audit log before it is sent, and its result before the run learns of it.
    """

    def __init__(self, hub: Hub, *, run_id: str, audit: AuditLog, board: Board) -> None:
        self._hub = hub
        self._run_id = run_id
        self._audit = audit
        self._board = board

    @property
    def blobs(self) -> Path:
        """Where ciphertext lies while it is sent."""
        return self._hub.blobs

    def send(self, order: Order, delivery: Delivery) -> None:
        """Record an order and open it.

        Raises:
            RunError: The audit log cannot be written. Nothing was sent.
        """
        self._audit.record(
            "asked",
            run=self._run_id,
            site=order.site,
            kind=order.kind,
            round=peek(order.envelope).server_round,
            message=order.message_id.hex(),
            blob=order.blob_digest.hex(),
            bytes=order.blob_bytes,
        )
        self._hub.send(order, Delivery(result=self._recorded(delivery.result), late=self._recorded_late(delivery.late)))

    def cancel(self, message_id: bytes) -> None:
        """Nobody waits for this order any more."""
        self._hub.cancel(message_id)
        self._note("cancelled", message=message_id.hex())

    def _recorded(self, deliver: Callable[[Result], None]) -> Callable[[Result], None]:
        def result(result: Result) -> None:
            message = result.message_id.hex()
            if isinstance(result, Answer):
                digest = hashlib.sha256(result.envelope).hexdigest()
                self._note("received", site=result.site, message=message, envelope=digest, bytes=result.size)
                self._board.reply(self._run_id, result.site, RECEIVED, only_after=(ASKED,))
            else:
                self._note("failed", site=result.site, message=message, failure=result.failure.slug)
            deliver(result)

        return result

    def _recorded_late(self, tell: Callable[[str, bytes], None]) -> Callable[[str, bytes], None]:
        def late(site: str, message_id: bytes) -> None:
            self._note("late", site=site, message=message_id.hex())
            tell(site, message_id)

        return late

    def _note(self, event: str, **facts: object) -> None:
        """Record what comes from the plane's thread, which nothing may stop; the round's end fails where this did."""
        try:
            self._audit.record(event, run=self._run_id, **facts)
        except CoterieError:
            log.exception("audit_line_lost", audit_event=event)
