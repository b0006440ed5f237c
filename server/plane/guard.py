"""What every call passes through: admission, a bound on how many there are, and refusals that tell only a code."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from grpc import aio

from common.crypto import CertificateRole, PeerIdentity
from common.transport.wire import Refusal
from server.plane.admission import Admission
from server.plane.faults import log_fault
from server.plane.hub import Hub
from server.plane.refusals import STATUS, RefusedCallError

Context = aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]

END_OF_STREAM: Final[object] = aio.EOF  # type: ignore[attr-defined]  # public, but left out of the published types
"""What reading yields when the peer has nothing more to say."""

_REVIEW_SECONDS: Final = 30.0
_SAME_REFUSAL_SECONDS: Final = 60.0
"""A refusal that repeats is noted once in this time: a peer must not be able to fill the audit log."""


class Call:
    """One open call. `close` ends it from any thread."""

    def __init__(self, identity: PeerIdentity, certificate: bytes) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is opened in its own task")
        self.identity, self.certificate = identity, certificate
        self.loop = asyncio.get_running_loop()
        self.refusal: Refusal | None = None
        self._task = task

    def close(self, refusal: Refusal) -> None:
        """End the call with a refusal; the first one counts."""
        with suppress(RuntimeError):  # the loop has ended, and the call with it
            self.loop.call_soon_threadsafe(self._close, refusal)

    def _close(self, refusal: Refusal) -> None:
        if self.refusal is None:
            self.refusal = refusal
            self._task.cancel()


Handler = Callable[[Call, Any, Context], Awaitable[Any]]


class Guard:
    """Opens calls, and closes them when their party is let in no more. Used in the plane's loop only."""

    def __init__(self, *, admission: Admission, hub: Hub, calls_each: int) -> None:
        self._admission, self._hub, self._calls_each = admission, hub, calls_each
        self._open: set[Call] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._noted: dict[tuple[str, Refusal], float] = {}
        self._stopping = False
        self._reviewed: object = None
        self._next_review = 0.0

    def wrap(self, handler: Handler, *roles: CertificateRole, streams: bool = False) -> Behaviour:
        """A handler for gRPC that only parties of these roles reach; `streams` says that it answers with a stream."""
        allowed = frozenset(roles)

        async def call(request: Any, context: Context) -> Any:
            who = ""
            try:
                certificate = self._admission.certificate(context.auth_context())
                identity = self._admission.identify(certificate)
                who = identity.name
                self._admission.check(identity, allowed)
                if streams:
                    # Before the call can be closed: gRPC cannot end a call, and would leave its peer to hang, while a
                    # first message with the metadata in it is still on the way.
                    await context.send_initial_metadata(())
                with self._opened(identity, certificate) as current:
                    return await _until_closed(current, handler(current, request, context))
            except RefusedCallError as e:
                self._note(who, e.refusal)
                refusal = e.refusal
            except (aio.AbortError, aio.UsageError):
                raise
            except Exception as e:  # noqa: BLE001 - the boundary: whatever it is, the peer learns only that it failed
                log_fault("plane_call_failed", e, party=who)
                refusal = Refusal.FAILED
            return await context.abort(STATUS[refusal], refusal.value)

        return call

    def review(self) -> None:
        """Close what is open for parties that are let in no more, and give up their orders.

        To be called about every second. It looks closer when the kit's files have changed, and now and then in any
        case, for certificates that run out: with a thousand streams that is not for nothing.
        """
        state, now = self._admission.state(), time.monotonic()
        if state == self._reviewed and now < self._next_review:
            return
        self._hub.shut_out(self._admission.denied_sites())
        for call in list(self._open):
            identity = call.identity
            issued = self._admission.issued(call.certificate)
            if (issued and self._admission.current(identity)) or call.refusal is not None:
                continue
            call.close(Refusal.DENIED)
            if identity.role == "site" and issued and not self._admission.expired(identity):
                self._hub.give_up(identity.name)
            self._hub.note("denied", identity.name, detail=f"{identity.serial:x}")
        if self._reviewed not in {None, state}:
            self._hub.note("list-changed", "")
        self._reviewed, self._next_review = state, now + _REVIEW_SECONDS

    def close_all(self, refusal: Refusal) -> None:
        """Close every call, and refuse those that come."""
        self._stopping = True
        for call in self._open:
            call.close(refusal)

    @contextmanager
    def _opened(self, identity: PeerIdentity, certificate: bytes) -> Iterator[Call]:
        whose = (identity.role, identity.name)
        if self._stopping:
            raise RefusedCallError(Refusal.STOPPING)
        if self._counts[whose] >= self._calls_each:
            raise RefusedCallError(Refusal.BUSY)
        call = Call(identity, certificate)
        self._counts[whose] += 1
        self._open.add(call)
        try:
            yield call
        finally:
            self._open.discard(call)
            self._counts[whose] -= 1
            if not self._counts[whose]:
                del self._counts[whose]

    def _note(self, who: str, refusal: Refusal) -> None:
        now, key = time.monotonic(), (who, refusal)
        if now - self._noted.get(key, -_SAME_REFUSAL_SECONDS) >= _SAME_REFUSAL_SECONDS:
            self._noted[key] = now
            self._hub.note("refused", who, detail=refusal.value)


async def _until_closed(call: Call, work: Awaitable[Any]) -> Any:
    """Await a handler; where the call was closed meanwhile, its refusal."""
    try:
        return await work
    except asyncio.CancelledError:
        if call.refusal is None:
            raise  # the peer has gone
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        raise RefusedCallError(call.refusal) from None
