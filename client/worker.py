"""Answers orders, one at a time: fetch what was sealed for this site, have the app answer it, store the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from client.connection import Connection
from client.mods import guard_mod
from client.orders import Orders, Task
from client.outbox import Outbox
from client.replays import Replays
from client.run_state import RunStates
from client.transfer import UnwantedError, fetch_blob, part_of
from common.crypto import Opening, peek
from common.errors import FailureCode, PeerError, RefusedError
from common.flower import RUN_ID, failure_of, stamp
from common.transport import wire_pb2
from common.transport.sealed import Blob, order_id, read_sealed, sealed_content
from common.transport.wire import MOST_ENVELOPE_BYTES

log = structlog.get_logger()

NODE: Final = 2


class Worker:
    """Works on orders.

    Guarantee: an order ends with a sealed update in the outbox or with a typed failure; nothing that is not sealed
    leaves. No order ends this process.
    """

    def __init__(
        self,
        app: ClientAppCallable,
        *,
        orders: Orders,
        outbox: Outbox,
        states: RunStates,
        inbox: Path,
        replays: Replays | None,
        connection: Connection,
        ready: Callable[[bytes], None],
        verify: Callable[[bytes], Opening],
        most_bytes: int,
    ) -> None:
        """Prepare.

        Args:
            app: Answers sealed messages with sealed messages or with errors.
            orders: What to work on.
            outbox: Where updates are stored.
            states: What clients keep of a run.
            inbox: Folder for blobs that are fetched.
            replays: Told of orders whose update is stored; None where the app writes down none.
            connection: Where blobs are fetched, and failures told.
            ready: Told of an update that is stored.
            verify: Opens an envelope that the coordinator sealed for this site, or raises SealError.
            most_bytes: Longest blob that is fetched.
        """
        self._app, self._orders, self._outbox, self._states = app, orders, outbox, states
        self._inbox, self._replays, self._connection = inbox, replays, connection
        self._ready, self._verify, self._most_bytes = ready, verify, most_bytes
        for message_id in outbox:
            self._settle(message_id)  # its process may have been killed before it did

    def run(self, ending: Callable[[], bool], closed: Callable[[], bool]) -> None:
        """Work until `ending`; a blob that is being fetched is left where it is when `closed`."""
        while (task := self._orders.next(ending)) is not None:
            try:
                self._work(task, closed)
            except UnwantedError:
                if task.cancelled:  # a connection that was closed goes on where it was
                    part_of(task.order, self._inbox).unlink(missing_ok=True)
            except PeerError as e:
                self._fail(task, e.failure)
            except Exception as e:  # noqa: BLE001 - the boundary: no order may end this process
                log.error("order_failed", order=task.message_id.hex(), error=type(e).__name__)  # noqa: TRY400
                self._fail(task, FailureCode.CLIENT_FAILED)
            finally:
                self._orders.end(task)
                self._ready(b"")

    def _work(self, task: Task, closed: Callable[[], bool]) -> None:
        order = task.order
        self._check(order)
        path = fetch_blob(self._connection, order, self._inbox, wanted=lambda: not task.cancelled and not closed())
        try:
            task.stage = "working"
            self._store(task, self._answer(task, path))
        finally:
            path.unlink(missing_ok=True)

    def _check(self, order: wire_pb2.Order) -> None:
        """Fetch nothing that was not sealed for this site: who has the coordinator's TLS key alone could fill a disk.

        Raises:
            PeerError: It was not.
        """
        if not 0 < order.blob_bytes <= self._most_bytes or len(order.envelope) > MOST_ENVELOPE_BYTES:
            raise PeerError(FailureCode.INVALID_REQUEST)
        try:
            opening = self._verify(order.envelope)
        except RefusedError as e:
            raise PeerError(FailureCode.INVALID_REQUEST) from e
        if (order.blob_bytes, order.blob_digest) != (opening.blob_bytes, opening.blob_digest):
            raise PeerError(FailureCode.INVALID_REQUEST)

    def _answer(self, task: Task, path: Path) -> Message:
        """What the app says to the sealed message."""
        order = task.order
        try:
            header = peek(order.envelope)
            message = Message(sealed_content(order.envelope, Blob.of_file(path, order.blob_bytes)), NODE, order.kind)
        except (RefusedError, ValueError) as e:  # no envelope, or no type of message
            raise PeerError(FailureCode.INVALID_REQUEST) from e
        if order_id(order.envelope) != order.message_id:  # a broadcast's message id is the same for every site
            raise PeerError(FailureCode.INVALID_REQUEST)
        state = self._states.take(header.run_id)
        context = Context(run_id=RUN_ID, node_id=NODE, node_config={}, state=state, run_config={})
        reply = guard_mod(stamp(message, message_id=order.message_id.hex()), context, self._app)
        self._states.put(header.run_id, context.state)  # before the answer: asked again, it gives the same answer
        return reply

    def _store(self, task: Task, reply: Message) -> None:
        """Put an answer where the sender finds it."""
        failure = failure_of(reply)
        if failure is not None:
            self._fail(task, failure)
            return
        envelope, blob = read_sealed(reply.content)
        header = peek(task.order.envelope)
        self._outbox.add(task.message_id, envelope, blob, run_id=header.run_id, request_id=header.message_id)
        self._settle(task.message_id)
        self._orders.end(task)  # from here on it is in the outbox
        if task.cancelled:
            self._outbox.drop(task.message_id)
            return
        log.info("update_ready", order=task.message_id.hex())
        self._ready(task.message_id)

    def _settle(self, message_id: bytes) -> None:
        """Never take an order again, now that its update is on the disk."""
        update = self._outbox.get(message_id)
        if self._replays is not None and update is not None:
            self._replays.stored(update.run_id, update.request_id)

    def _fail(self, task: Task, failure: FailureCode) -> None:
        log.warning("order_refused", order=task.message_id.hex(), failure=failure.slug)
        if self._orders.fail(task, failure):
            self._connection.tell_failure(task.message_id, int(failure))
