"""Whatever bytes a party sends: a typed refusal, no crash, no hang, and nothing that grows."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.transport import wire, wire_pb2
from common.transport.channel import refusal_of
from common.transport.wire import Refusal
from tests.helpers.plane import BOUND, Plane

# What any peer can hear; `resource-exhausted` is gRPC's own word for a message above its size limit.
ALLOWED = {*(refusal.value for refusal in Refusal if refusal is not Refusal.FAILED), "ok", "resource-exhausted"}


class Desk:
    """Answers every question."""

    def submit(self, *_: Any) -> dict[str, Any]:
        return {}

    ask = submit

    def follow(self, *_: Any) -> Iterator[dict[str, Any]]:
        yield {}

    def download(self, *_: Any) -> Any:
        raise AssertionError("a mutated question names no run")


def mutated(message: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or replace; sometimes leave it whole."""
    data = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 4:
                data[at : at + 4] = b"\xff" * rng.randrange(12)
            case 5:
                data = bytearray(rng.randbytes(rng.randrange(200)))
            case _:
                pass
    return bytes(data)


class Fuzz:
    """Sends mutated messages to every method, each over the connection of a party that may call it."""

    def __init__(self, plane: Plane, seed: int) -> None:
        self.plane, self.rng = plane, random.Random(seed)
        site, operator = plane.channel("hospital-a"), plane.channel("alice")
        self.order = plane.order("hospital-a", b"model" * 1000)
        self.methods = {
            wire.ATTACH: site.stream_stream(wire.ATTACH, None, None),
            wire.FETCH: site.unary_stream(wire.FETCH, None, None),
            wire.UPLOAD: site.stream_unary(wire.UPLOAD, None, None),
            wire.UPLOAD_STATE: site.unary_unary(wire.UPLOAD_STATE, None, None),
            wire.RENEW: site.unary_unary(wire.RENEW, None, None),
            wire.SUBMIT: operator.unary_unary(wire.SUBMIT, None, None),
            wire.ASK: operator.unary_unary(wire.ASK, None, None),
            wire.FOLLOW: operator.unary_stream(wire.FOLLOW, None, None),
        }

    def messages(self, method: str) -> list[bytes]:
        """Well-formed messages for a method, before they are mutated."""
        mine = self.order.message_id
        heartbeat = wire_pb2.Heartbeat(state="working", working_on=mine)
        # A failure of the open order itself would close it; the id of none keeps it open for all that follow.
        events = [
            wire_pb2.ClientEvent(hello=wire_pb2.Hello(protocol=1, version="1", held=[mine], instance=b"i" * 16)),
            wire_pb2.ClientEvent(heartbeat=heartbeat),
            wire_pb2.ClientEvent(failure=wire_pb2.Failure(message_id=b"m" * 16, code=1001)),
        ]
        start = wire_pb2.UploadStart(message_id=mine, envelope=b"e" * 50, blob_bytes=1 << 40, offset=0)
        known: dict[str, list[Any]] = {
            wire.ATTACH: events,
            wire.FETCH: [wire_pb2.FetchRequest(digest=self.order.blob_digest, offset=3)],
            wire.UPLOAD: [start],
            wire.UPLOAD_STATE: [wire_pb2.UploadStateRequest(message_id=mine)],
            wire.RENEW: [wire_pb2.CertificateRequest(csr_pem=b"-----BEGIN CERTIFICATE REQUEST-----")],
            wire.SUBMIT: [wire_pb2.SubmitRequest(config="{}", authorization="{}")],
            wire.ASK: [wire_pb2.Question(what="runs", run="latest")],
            wire.FOLLOW: [wire_pb2.Question(what="status", run="latest")],
        }
        return [mutated(message.SerializeToString(), self.rng) for message in known[method]]

    def once(self) -> int:
        """One call; how many messages it sent."""
        method = self.rng.choice(list(self.methods))
        messages = self.messages(method)
        if method == wire.UPLOAD:
            messages += [self.rng.randbytes(self.rng.randrange(300)) for _ in range(3)]
        streams = method in {wire.ATTACH, wire.UPLOAD}
        try:
            answer = self.methods[method](iter(messages) if streams else messages[0], timeout=BOUND)
            if hasattr(answer, "cancel"):
                for _ in answer:
                    pass
            outcome = "ok"
        except grpc.RpcError as e:
            outcome = refusal_of(e)
        assert outcome in ALLOWED, (method, messages, outcome)
        return len(messages)


def _fuzz(plane: Plane, count: int, seed: int) -> None:
    fuzz, sent = Fuzz(plane, seed), 0
    threads = threading.active_count()
    while sent < count:
        sent += fuzz.once()
    folder = plane.hub.blobs.parent / "uploads"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16 << 20
    assert len(list(folder.iterdir())) <= 1
    assert plane.results.empty()
    assert list(plane.hub.book.waiting()) == ["hospital-a"]
    assert threading.active_count() <= threads + 40  # pools, not one for each call
    assert len(plane.seen.events) < 3 * count
    other = plane.attach("hospital-b")
    other.beat()
    other.next("ping")


def test_mutated_messages_are_refused_and_change_nothing(start: Callable[..., Plane]):
    """2,000 of them, over every method: afterwards the same one order is open, and others are served."""
    _fuzz(start(desk=Desk()), 2_000, seed=1)


@pytest.mark.slow
def test_ten_thousand_mutated_messages(start: Callable[..., Plane], tmp_path: Path):
    """The same for long; another seed."""
    _fuzz(start(desk=Desk()), 10_000, seed=2)
