"""`Attach`: one stream for each agent, on which it hears of orders and tells that it is alive."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from contextlib import suppress
from typing import Final

import grpc
from grpc import aio

from common.errors import RefusedError
from common.transport import wire, wire_pb2
from common.transport.wire import Refusal
from server.plane.guard import END_OF_STREAM, Call, Context
from server.plane.hub import MISSED, Hub
from server.plane.limits import Limits
from server.plane.refusals import RefusedCallError

_MOST_WAITING: Final = 4096
"""Events that an agent may leave unread."""
_VERSION: Final = re.compile(r"[0-9A-Za-z.+-]{1,40}\Z")
"""What an agent may call its version: operators' terminals show it."""
_MOST_A_SECOND: Final = 200
"""Events of an agent that are taken in a second; more wait, which holds it back."""


_PING: Final = wire_pb2.ServerEvent(ping=wire_pb2.Ping()).SerializeToString()
"""Answers heartbeats: so an agent knows that the coordinator lives, without a timer for each stream here."""


class AttachedStream:
    """The hub's end of an agent's stream. It has a task only while there is something to send: most streams idle."""

    def __init__(self, call: Call, context: Context) -> None:
        self._call, self._context = call, context
        self._outbox: deque[bytes] = deque()
        self._sending: asyncio.Task[None] | None = None

    def post(self, event: wire_pb2.ServerEvent) -> None:
        """See `Session`."""
        with suppress(RuntimeError):  # the loop has ended, and the stream with it
            self._call.loop.call_soon_threadsafe(self.put, event.SerializeToString())

    def close(self, refusal: Refusal) -> None:
        """See `Session`."""
        self._call.close(refusal)

    def stop(self) -> None:
        """Send nothing more."""
        if self._sending is not None:
            self._sending.cancel()

    def put(self, event: bytes) -> None:
        """As `post`, in the plane's own thread."""
        if len(self._outbox) >= _MOST_WAITING:
            self.close(Refusal.SILENT)
            return
        self._outbox.append(event)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._outbox:
                await self._context.write(self._outbox.popleft())
        except (aio.BaseError, grpc.RpcError, aio.UsageError, asyncio.InvalidStateError):
            self._outbox.clear()  # the stream is broken, which its reader sees as well
        finally:
            self._sending = None


class Attaching:
    """The handler."""

    def __init__(self, hub: Hub, limits: Limits) -> None:
        self._hub, self._limits = hub, limits

    async def attach(self, call: Call, _events: object, context: Context) -> None:
        """Take an agent's events until it goes, is silent, or is refused."""
        hello = await self._hello(context)
        site, stream = call.identity.name, AttachedStream(call, context)
        self._hub.attach(site, hello, stream)
        try:
            async with asyncio.timeout(None) as silence:
                await self._listen(site, stream, context, silence)
        except TimeoutError:
            raise RefusedCallError(Refusal.SILENT) from None
        finally:
            stream.stop()
            self._hub.detach(site, stream)

    async def _hello(self, context: Context) -> wire_pb2.Hello:
        try:
            async with asyncio.timeout(self._limits.idle_seconds):
                first = await context.read()
        except TimeoutError:
            raise RefusedCallError(Refusal.SILENT) from None
        event = read_message(wire_pb2.ClientEvent, first)
        if event.WhichOneof("event") != "hello":
            raise RefusedCallError(Refusal.MALFORMED)
        hello = event.hello
        if hello.protocol != wire.PROTOCOL:
            raise RefusedCallError(Refusal.PROTOCOL)
        ids = [hello.instance, *hello.held]
        if (
            len(hello.held) > wire.MOST_HELD
            or not _VERSION.match(hello.version)
            or any(len(i) != wire.ID_BYTES for i in ids)
        ):
            raise RefusedCallError(Refusal.MALFORMED)
        return hello

    async def _listen(self, site: str, stream: AttachedStream, context: Context, silence: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        second, taken = loop.time(), 0
        while True:
            now = loop.time()
            if now - second >= 1:
                second, taken = now, 0
            elif taken >= _MOST_A_SECOND:
                await asyncio.sleep(second + 1 - now)
                continue
            silence.reschedule(now + MISSED * self._hub.heartbeat_seconds)
            data = await context.read()
            if data is END_OF_STREAM:
                return
            taken += 1
            self._take(site, stream, read_message(wire_pb2.ClientEvent, data))

    def _take(self, site: str, stream: AttachedStream, event: wire_pb2.ClientEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "heartbeat":
            self._hub.heard(site, stream, event.heartbeat)
            stream.put(_PING)
        elif kind == "failure" and len(event.failure.message_id) == wire.ID_BYTES:
            self._hub.heard(site, stream)
            self._hub.failed(site, event.failure.message_id, event.failure.code)
        else:
            raise RefusedCallError(Refusal.MALFORMED)


def read_message(kind: type[wire.M], data: object) -> wire.M:
    """A control message.

    Raises:
        RefusedCallError: There is none, or it cannot be read.
    """
    if not isinstance(data, bytes):
        raise RefusedCallError(Refusal.MALFORMED)
    try:
        return wire.parse(kind, data)
    except RefusedError as e:
        raise RefusedCallError(Refusal.MALFORMED) from e
