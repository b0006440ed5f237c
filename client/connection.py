"""The one connection to the coordinator: outbound, over mutual TLS, made again and again for as long as the site runs.

The control stream brings orders and carries heartbeats; bulk goes over the same connection. What gRPC raises ends here.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol, cast

import grpc
import structlog

from common.errors import UnreachableError
from common.kit import Kit
from common.transport import wire_pb2
from common.transport.channel import PlaneCalls, Stream, channel, refusal_of
from common.transport.wire import PROTOCOL, Refusal

log = structlog.get_logger()

_SILENT_INTERVALS = 3
"""Heartbeats without a word from the coordinator after which the connection counts as lost."""
_FINE_STEPS = 1 << 30
_SLOWLY = {Refusal.DENIED, Refusal.PROTOCOL, Refusal.MALFORMED}
"""Only a person can mend these; then it goes on by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a site waits before it tries again, and for how long it tries.

    Attributes:
        first_pause: Most seconds before the second attempt; doubles from one to the next.
        longest_pause: Most seconds between two attempts.
        elsewhere_seconds: For how long another process may keep this site's place before this one gives up: a machine
            that lost power keeps it until the coordinator misses its heartbeats.
        unheard_seconds: Interval of heartbeats until the coordinator names one.
    """

    first_pause: float = 0.5
    longest_pause: float = 60.0
    elsewhere_seconds: float = 120.0
    unheard_seconds: float = 10.0


class Backoff:
    """Pauses that grow, each drawn anew: a thousand sites must not come back in one instant."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._attempts = 0

    def reset(self) -> None:
        """Begin again with short pauses."""
        self._attempts = 0

    def next(self, *, slowly: bool = False) -> float:
        """Seconds until the next attempt: between nothing and the present bound, or (slowly) about the longest."""
        longest, drawn = self._patience.longest_pause, secrets.randbelow(_FINE_STEPS) / _FINE_STEPS
        if slowly:
            return longest * (0.5 + drawn / 2)
        bound = min(longest, self._patience.first_pause * (1 << min(self._attempts, 32)))
        self._attempts += 1
        return bound * drawn


class CallRefusedError(Exception):
    """A call ended without an answer.

    Attributes:
        refusal: The coordinator's short code, or what gRPC says, as `unreachable`.
    """

    def __init__(self, refusal: str) -> None:
        super().__init__(refusal)
        self.refusal = refusal


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what gRPC raises into CallRefusedError."""
    try:
        yield
    except grpc.RpcError as e:
        refusal = refusal_of(e)
        if refusal == "unreachable" and "SSL" in (cast("grpc.Call", e).details() or ""):
            refusal = "tls-failed"  # who answers there is not this federation's coordinator, or does not know this site
        raise CallRefusedError(refusal) from None
    except ValueError as e:  # the connection was closed meanwhile
        raise CallRefusedError("closed") from e


class Listener(Protocol):
    """Whom the connection serves. Called in its thread; must be quick."""

    def held(self) -> list[bytes]:
        """Message ids of the orders that are worked on, or whose updates wait to be sent."""

    def status(self) -> tuple[bytes, str]:
        """Message id of the order that is worked on, or empty; and what is being done."""

    def attached(self) -> None:
        """The coordinator has let this site in, anew."""

    def ordered(self, order: wire_pb2.Order) -> None:
        """There is something to do."""

    def cancelled(self, message_id: bytes) -> None:
        """Nobody waits for this any more."""

    def received(self, message_id: bytes) -> None:
        """The coordinator has the update (or failure) on its disk."""


class Connection:
    """Keeps this site attached.

    Guarantee: a lost connection is noticed within a minute, and another is tried after pauses of up to
    `patience.longest_pause`, without end. Each uses the certificate that is in the kit then.
    """

    def __init__(self, kit: Kit, listener: Listener, *, patience: Patience | None = None, wait: bool = True) -> None:
        """Prepare; nothing is connected yet.

        Args:
            kit: A site's kit.
            listener: Told of what the coordinator says.
            patience: How long to wait between attempts.
            wait: Whether to wait for a coordinator that cannot be reached at first.
        """
        self.patience = patience or Patience()
        self._kit = kit
        self._listener = listener
        self._wait = wait
        self._instance = secrets.token_bytes(16)
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._calls: PlaneCalls | None = None
        self._outgoing: _Outgoing | None = None
        self._stream: Stream[wire_pb2.ServerEvent] | None = None
        self._ever = False
        self._unwelcome: threading.Timer

    def run(self) -> None:
        """Stay attached until `close`.

        Raises:
            UnreachableError: Another process keeps this site's place; or, without `wait`, the first attempt failed.
            KitError: The certificate cannot be read.
        """
        backoff, elsewhere_since = Backoff(self.patience), None
        while not self._closed.is_set():
            attached, refusal = self._session()
            if self._closed.is_set():
                return
            if attached:
                backoff.reset()
            if refusal == Refusal.ATTACHED_ELSEWHERE:
                elsewhere_since = elsewhere_since or time.monotonic()
                if time.monotonic() - elsewhere_since >= self.patience.elsewhere_seconds:
                    raise UnreachableError(
                        f"another client is attached as `{self._kit.name}`",
                        hint="stop it; if you know of none, the keys were copied: shut the site out and enrol it anew",
                    )
            else:
                elsewhere_since = None
            if not self._wait and not self._ever:
                raise UnreachableError(
                    f"the coordinator at {self._kit.address} does not let this site in: {refusal}",
                    hint="without --no-wait the client goes on trying",
                )
            pause = backoff.next(slowly=refusal in _SLOWLY)
            log.warning("detached", reason=refusal, coordinator=self._kit.address, retry_in_seconds=round(pause, 1))
            self._closed.wait(pause)

    def close(self) -> None:
        """End it, from any thread; `run` returns soon."""
        self._closed.set()
        with self._changed:
            stream = self._stream
            self._changed.notify_all()
        if stream is not None:
            stream.cancel()

    def tell_failure(self, message_id: bytes, code: int) -> None:
        """Say that an order ends without an update; lost where nothing is attached."""
        with self._changed:
            if self._outgoing is not None and self._calls is not None:
                failure = wire_pb2.Failure(message_id=message_id, code=code)
                self._outgoing.put(wire_pb2.ClientEvent(failure=failure))

    def calls(self, wanted: Callable[[], bool]) -> PlaneCalls | None:
        """The attached connection, as soon as there is one; None once it is closed or not `wanted` any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls is not None or self._closed.is_set() or not wanted())
            return self._calls if not self._closed.is_set() and wanted() else None

    def calls_now(self) -> PlaneCalls | None:
        """The attached connection, if there is one."""
        return self._calls

    def pause(self, seconds: float, wanted: Callable[[], bool]) -> None:
        """Wait, unless it is closed or not `wanted` any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or not wanted(), timeout=seconds)

    def wake(self) -> None:
        """Have `wanted` asked again."""
        with self._changed:
            self._changed.notify_all()

    def _session(self) -> tuple[bool, str]:
        """One connection from its start to its end: whether it was attached, and why it ended."""
        connection = channel(self._kit.address, self._kit.tls())
        outgoing = _Outgoing(self._hello(), self._heartbeat, interval=self.patience.unheard_seconds)
        # Whatever holds it up, a connection on which this site is not let in is none. `_take` stops the clock.
        self._unwelcome = threading.Timer(_SILENT_INTERVALS * self.patience.unheard_seconds, outgoing.give_up)
        self._unwelcome.daemon = True
        try:
            calls = PlaneCalls(connection)
            with refusals():
                stream = calls.attach(outgoing)
                outgoing.on_silence = stream.cancel
                self._unwelcome.start()
                with self._changed:
                    self._stream = stream
                if self._closed.is_set():
                    stream.cancel()
                for event in stream:
                    outgoing.heard()
                    self._take(event, calls, outgoing)
            refusal = "ended"
        except CallRefusedError as e:
            refusal = "silent" if outgoing.silent else e.refusal
        finally:
            self._unwelcome.cancel()
            outgoing.put(None)
            with self._changed:
                attached, self._calls, self._outgoing, self._stream = self._calls is not None, None, None, None
            connection.close()
        return attached, refusal

    def _take(self, event: wire_pb2.ServerEvent, calls: PlaneCalls, outgoing: _Outgoing) -> None:
        kind = event.WhichOneof("event")
        if kind == "welcome":
            self._ever = True
            self._unwelcome.cancel()
            outgoing.interval = max(event.welcome.heartbeat_seconds, 0.01)
            outgoing.put(self._heartbeat())  # ends the wait for the former interval
            with self._changed:
                self._calls, self._outgoing = calls, outgoing
                self._changed.notify_all()
            log.info("attached", coordinator=self._kit.address, coordinator_version=event.welcome.version[:40])
            self._listener.attached()
        elif kind == "order":
            self._listener.ordered(event.order)
        elif kind == "cancel":
            self._listener.cancelled(event.cancel.message_id)
        elif kind == "receipt":
            self._listener.received(event.receipt.message_id)
        elif kind == "ping":
            outgoing.expects = self._calls is not None

    def _hello(self) -> wire_pb2.ClientEvent:
        hello = wire_pb2.Hello(
            protocol=PROTOCOL, version=version("coterie"), held=self._listener.held(), instance=self._instance
        )
        return wire_pb2.ClientEvent(hello=hello)

    def _heartbeat(self) -> wire_pb2.ClientEvent:
        working_on, state = self._listener.status()
        return wire_pb2.ClientEvent(heartbeat=wire_pb2.Heartbeat(working_on=working_on, state=state))


class _Outgoing:
    """What the control stream says: what is put here, and a heartbeat whenever there was nothing for an interval.

    gRPC reads it in a thread of its own, which also watches that the coordinator is heard where it says something
    regularly. A dead connection is noticed by gRPC itself.
    """

    def __init__(
        self, hello: wire_pb2.ClientEvent, heartbeat: Callable[[], wire_pb2.ClientEvent], *, interval: float
    ) -> None:
        self.interval = interval
        self.expects = False
        self.silent = False
        self.on_silence: Callable[[], object] = bool
        self._heartbeat = heartbeat
        self._heard = time.monotonic()
        self._events: queue.SimpleQueue[wire_pb2.ClientEvent | None] = queue.SimpleQueue()
        self._events.put(hello)

    def put(self, event: wire_pb2.ClientEvent | None) -> None:
        """Say this next; None ends the stream."""
        self._events.put(event)

    def heard(self) -> None:
        """The coordinator said something."""
        self._heard = time.monotonic()

    def give_up(self) -> None:
        """End the stream: the coordinator says nothing."""
        self.silent = True
        self.on_silence()

    def __iter__(self) -> Iterator[wire_pb2.ClientEvent]:
        return self

    def __next__(self) -> wire_pb2.ClientEvent:
        try:
            event = self._events.get(timeout=self.interval)
        except queue.Empty:
            event = self._heartbeat()
        if self.expects and time.monotonic() - self._heard > _SILENT_INTERVALS * self.interval:
            self.give_up()
            raise StopIteration
        if event is None:
            raise StopIteration
        return event
