"""`Fetch`, `Upload` and `UploadState`: models down, updates up, in raw frames that can be continued after a cut."""

from __future__ import annotations

import asyncio
from functools import partial

from common.transport import wire, wire_pb2
from common.transport.wire import FRAME_BYTES, Refusal
from server.plane.attaching import read_message
from server.plane.files import Files
from server.plane.guard import END_OF_STREAM, Call, Context
from server.plane.hub import Hub
from server.plane.limits import Limits
from server.plane.orders import Answer
from server.plane.refusals import RefusedCallError
from server.plane.uploads import Writing


class Bulk:
    """The handlers. Each stream holds a few frames in memory, whatever the size of what it carries."""

    def __init__(self, hub: Hub, limits: Limits, files: Files) -> None:
        self._hub, self._limits, self._files = hub, limits, files
        self._places = asyncio.Semaphore(limits.uploads)
        self._streams: dict[tuple[str, bytes], Call] = {}
        """The one stream of each update: a site that opens more must not hold the places of the others."""

    async def fetch(self, call: Call, request: bytes, context: Context) -> None:
        """Send a blob from an offset on."""
        asked = read_message(wire_pb2.FetchRequest, request)
        order = self._hub.book.fetchable(call.identity.name, asked.digest)
        if asked.offset > order.blob_bytes:
            raise RefusedCallError(Refusal.WRONG_OFFSET)
        await self._files.send(context, order.blob, size=order.blob_bytes, offset=asked.offset)

    async def upload_state(self, call: Call, request: bytes, _context: Context) -> bytes:
        """How much of an update is there."""
        message_id = read_message(wire_pb2.UploadStateRequest, request).message_id
        order = self._hub.book.awaited(call.identity.name, message_id)
        if isinstance(order, int):
            return _status(order, complete=True)
        return _status(self._hub.uploads.received(message_id), complete=False)

    async def upload(self, call: Call, _frames: object, context: Context) -> bytes:
        """Take in an update, or its continuation."""
        site = call.identity.name
        try:
            async with asyncio.timeout(self._limits.idle_seconds):
                start = read_message(wire_pb2.UploadStart, await context.read())
        except TimeoutError:
            raise RefusedCallError(Refusal.SILENT) from None
        received = self._check(site, start)
        if received is not None:
            return _status(received, complete=True)
        whose = (site, start.message_id)
        before, self._streams[whose] = self._streams.get(whose), call
        if before is not None:
            before.close(Refusal.SUPERSEDED)
        try:
            async with self._places:  # until then nothing is read, which holds the sender back
                received = self._check(site, start)  # much can have happened meanwhile
                if received is not None:
                    return _status(received, complete=True)
                return await self._receive(site, start, context)
        finally:
            if self._streams.get(whose) is call:
                del self._streams[whose]

    def _check(self, site: str, start: wire_pb2.UploadStart) -> int | None:
        """Refuse what cannot become an answer; the size of the update, where it is there already."""
        if len(start.message_id) != wire.ID_BYTES or not 0 < len(start.envelope) <= wire.MOST_ENVELOPE_BYTES:
            raise RefusedCallError(Refusal.MALFORMED)
        order = self._hub.book.awaited(site, start.message_id)
        if isinstance(order, int):
            return order
        if start.blob_bytes < 1 or start.offset > start.blob_bytes:
            raise RefusedCallError(Refusal.MALFORMED)
        if start.blob_bytes > order.most_bytes:
            raise RefusedCallError(Refusal.TOO_LARGE)
        return None

    async def _receive(self, site: str, start: wire_pb2.UploadStart, context: Context) -> bytes:
        uploads, message_id = self._hub.uploads, start.message_id
        begin = partial(uploads.begin, envelope=start.envelope, size=start.blob_bytes, offset=start.offset)
        opening = asyncio.ensure_future(self._files.run(begin, message_id))
        try:
            writing = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on, and leaves an open file
            opening.add_done_callback(self._let_go)
            raise
        try:
            try:
                self._hub.book.awaited(site, message_id)
            except RefusedCallError:  # cancelled while the file was opened: nobody else would remove it
                uploads.drop(message_id)
                raise
            if not await self._frames(writing, context):
                return _status(start.blob_bytes - writing.left, complete=False)
            await self._files.run(self._complete, writing, site, start)
            return _status(start.blob_bytes, complete=True)
        finally:
            self._files.later(writing.close)

    def _let_go(self, opening: asyncio.Future[Writing]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._files.later(opening.result().close)

    async def _frames(self, writing: Writing, context: Context) -> bool:
        """Write frame by frame until the sender ends; whether all is there."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limits.idle_seconds) as idle:
                mark = writing.left
                while (frame := await context.read()) is not END_OF_STREAM:
                    if not frame or len(frame) > FRAME_BYTES:
                        raise RefusedCallError(Refusal.MALFORMED)
                    await self._files.run(writing.append, frame)
                    # Not by frame: a peer that sends a byte now and then would hold its place for ever.
                    if mark - writing.left >= FRAME_BYTES:
                        mark = writing.left
                        idle.reschedule(loop.time() + self._limits.idle_seconds)
        except TimeoutError:
            raise RefusedCallError(Refusal.SILENT) from None
        return writing.left == 0

    def _complete(self, writing: Writing, site: str, start: wire_pb2.UploadStart) -> None:
        """In one piece, in a thread: a peer that goes now must not leave a file that nobody knows of."""
        path = writing.finish()
        answer = Answer(
            message_id=start.message_id, site=site, envelope=start.envelope, path=path, size=start.blob_bytes
        )
        self._hub.answered(answer)


def _status(received: int, *, complete: bool) -> bytes:
    return wire_pb2.UploadStatus(received=received, complete=complete).SerializeToString()
