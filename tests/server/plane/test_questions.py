"""Operators' calls reach the desk, and its answers reach them."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.crypto import PeerIdentity
from common.errors import RunError
from common.transport import wire_pb2
from common.transport.wire import FRAME_BYTES
from server.plane.desk import Document, Download
from tests.helpers.plane import BOUND, Plane, refused

RESULT = os.urandom(FRAME_BYTES + 99)


class Desk:
    """Answers with what it was asked; a test sends what followers see."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "result"
        self.path.write_bytes(RESULT)
        self.news: queue.SimpleQueue[Document] = queue.SimpleQueue()
        self.left = threading.Event()

    def submit(self, identity: PeerIdentity, text: str, authorization: str) -> Document:
        return {"by": identity.name, "config": text, "authorization": authorization}

    def ask(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Document:
        if what == "fault":
            raise RuntimeError("a secret of the coordinator")
        if what == "mistake":
            raise RunError("there is no such run", hint="coterie runs lists them")
        return {"by": identity.name, "what": what, "run": run, "argument": argument}

    def follow(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Iterator[Document | None]:
        try:
            while (item := self._news()) != {"end": True}:
                if item == {"mistake": True}:
                    raise RunError("the run is gone", hint="")
                yield item
        finally:
            self.left.set()

    def _news(self) -> Document | None:
        try:
            return self.news.get(timeout=0.05)
        except queue.Empty:
            return None

    def download(self, identity: PeerIdentity, run: str) -> Download:
        if run != "latest":
            raise RunError("there is no such run", hint="")
        return Download(envelope=b"sealed for " + identity.name.encode(), path=self.path)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def plane(start: Callable[..., Plane], desk: Desk) -> Plane:
    return start(desk=desk, followers=1, watch_seconds=0.02)


def _said(document: wire_pb2.Document) -> Any:
    return json.loads(document.json)


def test_a_submitted_run_reaches_the_desk_with_who_submits(plane: Plane):
    """The identity is TLS's, not the request's."""
    answer = plane.operator().submit(wire_pb2.SubmitRequest(config="{}", authorization="signed"))
    assert _said(answer) == {"by": "alice", "config": "{}", "authorization": "signed"}


def test_a_question_is_answered(plane: Plane):
    """All its fields arrive."""
    answer = plane.operator().ask(wire_pb2.Question(what="status", run="latest", argument="x"))
    assert _said(answer) == {"by": "alice", "what": "status", "run": "latest", "argument": "x"}


def test_an_operator_is_told_what_is_wrong_but_no_fault(plane: Plane):
    """Coterie's own errors are for people; anything else stays with the coordinator."""
    answer = _said(plane.operator().ask(wire_pb2.Question(what="mistake")))
    assert answer["error"] == {
        "code": "run-failed",
        "message": "there is no such run",
        "hint": "coterie runs lists them",
        "exit_code": 9,
    }
    assert refused(lambda: plane.operator().ask(wire_pb2.Question(what="fault"))) == "failed"


def test_answers_are_followed_as_they_come(plane: Plane, desk: Desk):
    """Nothing new is not told; the end is."""
    stream = plane.operator().follow(wire_pb2.Question(what="status"))
    for item in ({"round": 1}, {"round": 2}):
        desk.news.put(item)
    assert [_said(next(stream)), _said(next(stream))] == [{"round": 1}, {"round": 2}]
    desk.news.put({"end": True})
    assert list(stream) == []
    assert desk.left.wait(BOUND)


def test_a_mistake_while_following_is_the_last_answer(plane: Plane, desk: Desk):
    """The operator reads why it ended."""
    stream = plane.operator().follow(wire_pb2.Question(what="status"))
    desk.news.put({"mistake": True})
    assert [_said(one)["error"]["message"] for one in stream] == ["the run is gone"]


def test_who_stops_following_frees_the_desk(plane: Plane, desk: Desk):
    """The desk's answers are closed, and another operator's call has the place."""
    stream = plane.operator().follow(wire_pb2.Question(what="status"))
    desk.news.put({"round": 1})
    next(stream)
    assert refused(lambda: plane.operator().follow(wire_pb2.Question())) == "busy"
    stream.cancel()
    assert desk.left.wait(BOUND)
    again = plane.operator().follow(wire_pb2.Question(what="status"))
    desk.news.put({"round": 2})
    assert _said(next(again)) == {"round": 2}
    desk.news.put({"end": True})
    assert list(again) == []


@pytest.mark.parametrize("offset", [0, 1, FRAME_BYTES, len(RESULT)])
def test_a_result_is_downloaded_from_any_byte(plane: Plane, offset: int):
    """The envelope comes first, always."""
    envelope, *frames = plane.operator().download(wire_pb2.Question(run="latest", argument=str(offset)))
    assert envelope == b"sealed for alice"
    assert b"".join(frames) == RESULT[offset:]


def test_a_result_that_is_not_there_cannot_be_downloaded(plane: Plane):
    """Nor from beyond its end, nor from what is no number."""
    download = plane.operator().download
    assert refused(lambda: download(wire_pb2.Question(run="other"))) == "no-result"
    beyond = wire_pb2.Question(run="latest", argument=str(len(RESULT) + 1))
    assert refused(lambda: download(beyond)) == "wrong-offset"
    for argument in ("-1", "x", "9" * 20, "²"):
        question = wire_pb2.Question(run="latest", argument=argument)
        assert refused(lambda question=question: download(question)) == "malformed"


def test_stopping_does_not_wait_for_followers(plane: Plane, desk: Desk):
    """Their streams end with the reason."""
    stream = plane.operator().follow(wire_pb2.Question(what="status"))
    desk.news.put({"round": 1})
    next(stream)
    plane.server.stop()
    assert refused(lambda: stream) == "stopping"
