"""`Submit`, `Ask`, `Follow` and `Download`: operators' calls, handed to the desk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

from common.errors import CoterieError
from common.transport import wire_pb2
from common.transport.wire import FRAME_BYTES, Refusal
from server.plane.attaching import read_message
from server.plane.desk import Document, OperatorDesk
from server.plane.files import Files
from server.plane.guard import Call, Context
from server.plane.refusals import RefusedCallError

_END: Final[Mapping[str, Any]] = {}


class Questions:
    """The handlers."""

    def __init__(self, desk: OperatorDesk, *, files: Files, asking: Files, following: Files, followers: int) -> None:
        self._desk, self._files, self._asking, self._following = desk, files, asking, following
        self._free = followers

    async def submit(self, call: Call, request: bytes, _context: Context) -> bytes:
        """Queue a run."""
        asked = read_message(wire_pb2.SubmitRequest, request)
        try:
            answer = await self._asking.run(self._desk.submit, call.identity, asked.config, asked.authorization)
        except CoterieError as e:
            answer = error_document(e)
        return _encode(answer)

    async def ask(self, call: Call, request: bytes, _context: Context) -> bytes:
        """One answer."""
        asked = read_message(wire_pb2.Question, request)
        try:
            answer = await self._asking.run(self._desk.ask, call.identity, asked.what, asked.run, asked.argument)
        except CoterieError as e:
            answer = error_document(e)
        return _encode(answer)

    async def follow(self, call: Call, request: bytes, context: Context) -> None:
        """Answers as they come, until the desk ends or the operator goes."""
        asked = read_message(wire_pb2.Question, request)
        if not self._free:
            raise RefusedCallError(Refusal.BUSY)  # each holds a thread: nobody waits for one here
        self._free -= 1
        source = _Source()
        try:
            await self._following.run(
                source.start, self._desk, call.identity, asked.what, asked.run, asked.argument
            )  # fmt: skip
            while (answer := await self._following.run(source.take)) is not _END:
                if answer is not None:
                    await context.write(_encode(answer))
        except CoterieError as e:
            await context.write(_encode(error_document(e)))
        finally:
            self._free += 1
            self._following.later(source.close)

    async def download(self, call: Call, request: bytes, context: Context) -> None:
        """A sealed result: its envelope, then the blob from the byte on that `argument` says."""
        asked = read_message(wire_pb2.Question, request)
        text = asked.argument or "0"
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise RefusedCallError(Refusal.MALFORMED)
        try:
            result = await self._asking.run(self._desk.download, call.identity, asked.run)
            size = (await self._files.run(result.path.stat)).st_size
        except (CoterieError, FileNotFoundError) as e:
            raise RefusedCallError(Refusal.NO_RESULT) from e
        if int(text) > size or len(result.envelope) > FRAME_BYTES:
            raise RefusedCallError(Refusal.WRONG_OFFSET)
        await context.write(result.envelope)
        await self._files.send(context, result.path, size=size, offset=int(text))


class _Source:
    """The desk's answers, taken and closed one at a time: a call can end while a thread waits for the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Iterator[Document | None] = iter(())

    def start(self, desk: OperatorDesk, *question: Any) -> None:
        with self._lock:
            self._answers = desk.follow(*question)

    def take(self) -> Document | None:
        with self._lock:
            return next(self._answers, _END)

    def close(self) -> None:
        with self._lock:
            close = getattr(self._answers, "close", None)
            if close is not None:
                close()
            self._answers = iter(())


def error_document(error: CoterieError) -> Document:
    """What an operator is told of an error."""
    facts = {"code": error.code, "message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    return {"error": facts}


def _encode(answer: Document) -> bytes:
    return wire_pb2.Document(json=json.dumps(answer)).SerializeToString()
