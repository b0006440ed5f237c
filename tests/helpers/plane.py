"""A plane on loopback with real certificates, and agents whose every word a test writes itself."""

from __future__ import annotations

import hashlib
import os
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from common.kit import Kit, Tls, load_kit
from common.transport import wire, wire_pb2
from common.transport.channel import OperatorCalls, PlaneCalls, channel, refusal_of
from server.plane.hub import Hub
from server.plane.limits import Limits
from server.plane.orders import Delivery, Event, Order, Result
from server.plane.server import PlaneServer
from server.provisioning import provision
from server.provisioning.settings import Federation

BOUND = 60.0
"""Seconds after which a test that waits has failed; nothing is expected to take as long."""
SITES, OPERATORS = ("hospital-a", "hospital-b", "hospital-c"), ("alice",)


def make_kits(folder: Path, *, name: str = "study") -> Path:
    """Kits of a whole federation; the coordinator's is `server`."""
    federation = Federation(
        name=name, server="127.0.0.1:8471", sites={s: {} for s in SITES}, operators={o: {} for o in OPERATORS}
    )
    provision(federation, folder)
    return folder


@dataclass
class Observed:
    """What a hub's observer was told; a test waits for what it needs to see."""

    events: list[Event] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def kinds(self, party: str | None = None) -> list[str]:
        return [event.kind for event in self.events if party in {None, event.party}]

    def wait_for(self, kind: str, *, party: str | None = None, count: int = 1) -> None:
        with self.changed:
            seen = self.changed.wait_for(lambda: self.kinds(party).count(kind) >= count, BOUND)
        assert seen, f"no {kind} of {party} among {self.kinds()}"


@dataclass
class Plane:
    """A running plane and the kits of everybody around it."""

    kits: Path
    hub: Hub
    server: PlaneServer
    seen: Observed
    results: queue.SimpleQueue[Result] = field(default_factory=queue.SimpleQueue)
    late: queue.SimpleQueue[tuple[str, bytes]] = field(default_factory=queue.SimpleQueue)
    closing: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def tls(self, name: str) -> Tls:
        return load_kit(self.kits / name, role=None).tls()

    def channel(self, who: str | Tls) -> grpc.Channel:
        """A connection as a party, or with any other certificate."""
        made = channel(self.address, self.tls(who) if isinstance(who, str) else who)
        self.closing.append(made.close)
        return made

    def calls(self, who: str | Tls) -> PlaneCalls:
        return PlaneCalls(self.channel(who))

    def operator(self, who: str | Tls = "alice") -> OperatorCalls:
        return OperatorCalls(self.channel(who))

    def attach(self, site: str, **hello: Any) -> Agent:
        """An agent that is attached."""
        agent = Agent(self.calls(site), **hello)
        self.closing.append(agent.close)
        agent.next("welcome")
        return agent

    def order(self, site: str, model: bytes = b"model", **changes: Any) -> Order:
        """Send an order whose blob is these bytes."""
        path = self.hub.blobs / hashlib.sha256(model).hexdigest()
        path.write_bytes(model)
        facts: dict[str, Any] = {
            "message_id": os.urandom(16),
            "site": site,
            "kind": "train",
            "envelope": os.urandom(100),
            "blob": path,
            "blob_digest": bytes.fromhex(path.name),
            "blob_bytes": len(model),
            "most_bytes": 16 * wire.FRAME_BYTES,
        }
        order = Order(**facts | changes)
        self.hub.send(order, Delivery(result=self.results.put, late=lambda *what: self.late.put(what)))
        return order

    def result(self) -> Result:
        return self.results.get(timeout=BOUND)


@contextmanager
def running_plane(
    kits: Path, folder: Path, *, heartbeat_seconds: float = 20.0, desk: Any = None, port: int = 0, **limits: Any
) -> Iterator[Plane]:
    """A plane that listens at this port, or at a free one, of this machine."""
    seen = Observed()
    hub = Hub(folder, observe=seen, heartbeat_seconds=heartbeat_seconds)
    kit = load_kit(kits / "server", role="coordinator")
    server = PlaneServer(kit, host="127.0.0.1", port=port, hub=hub, desk=desk, limits=Limits(**limits))
    plane = Plane(kits=kits, hub=hub, server=server, seen=seen)
    try:
        server.start()
        yield plane
    finally:
        for close in reversed(plane.closing):
            close()
        server.stop(grace=0)
        hub.close()


class Agent:
    """One attached stream; says what a test tells it to, and keeps what it hears."""

    def __init__(self, calls: PlaneCalls, *, held: Sequence[bytes] = (), instance: bytes = b"", **hello: Any) -> None:
        self.calls = calls
        self.instance = instance or secrets.token_bytes(16)
        self._heard: queue.SimpleQueue[wire_pb2.ServerEvent | str] = queue.SimpleQueue()
        self._says: queue.SimpleQueue[wire_pb2.ClientEvent | None] = queue.SimpleQueue()
        facts = {"protocol": wire.PROTOCOL, "version": "test", "held": list(held), "instance": self.instance} | hello
        self.say(hello=wire_pb2.Hello(**facts))
        self._stream = calls.attach(iter(self._says.get, None))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def say(self, **event: Any) -> None:
        self._says.put(wire_pb2.ClientEvent(**event))

    def beat(self, state: str = "idle", working_on: bytes = b"") -> None:
        self.say(heartbeat=wire_pb2.Heartbeat(state=state, working_on=working_on))

    def fail(self, message_id: bytes, code: int) -> None:
        self.say(failure=wire_pb2.Failure(message_id=message_id, code=code))

    def next(self, kind: str) -> Any:
        """The next event, which must be of this kind."""
        event = self._heard.get(timeout=BOUND)
        assert not isinstance(event, str), f"the stream ended with {event!r}, instead of bringing {kind}"
        assert event.WhichOneof("event") == kind, event
        return getattr(event, kind)

    def end(self) -> str:
        """Why the stream ended; what came before is skipped."""
        while not isinstance(event := self._heard.get(timeout=BOUND), str):
            pass
        return event

    def leave(self) -> None:
        """End the stream in good order."""
        self._says.put(None)

    def close(self) -> None:
        """Break the stream."""
        self._stream.cancel()
        self._says.put(None)
        self._reader.join(BOUND)

    def _read(self) -> None:
        try:
            for event in self._stream:
                self._heard.put(event)
            self._heard.put("ok")
        except grpc.RpcError as e:
            self._heard.put(refusal_of(e))


def upload(
    calls: PlaneCalls,
    order: Order,
    blob: bytes,
    *,
    offset: int = 0,
    envelope: bytes = b"envelope",
    frames: Iterable[bytes] | None = None,
    **changes: Any,
) -> wire_pb2.UploadStatus:
    """Send an update from an offset on; `frames` sends others instead."""
    facts = {"message_id": order.message_id, "envelope": envelope, "blob_bytes": len(blob), "offset": offset} | changes
    return calls.upload(wire_pb2.UploadStart(**facts), cut(blob[offset:]) if frames is None else frames)


def cut(blob: bytes) -> list[bytes]:
    """Bytes in frames."""
    return [blob[at : at + wire.FRAME_BYTES] for at in range(0, len(blob), wire.FRAME_BYTES)]


def refused(call: Callable[[], Any]) -> str:
    """The code with which a call, or the stream that it returns, is refused."""
    try:
        answer = call()
        if hasattr(answer, "cancel"):
            for _ in answer:
                pass
    except grpc.RpcError as e:
        return refusal_of(e)
    raise AssertionError("it was not refused")


class Tap:
    """Frames that a test lets through one by one, so that it knows what the other end can have."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = list(frames)

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._frames.put(self._waiting.pop(0))

    def put(self, frame: bytes) -> None:
        self._frames.put(frame)

    def end(self) -> None:
        self._frames.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._frames.get, None)


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[queue.SimpleQueue[Any]]:
    """Run beside the test; what it returned, or the refusal that it ended with, comes by the queue."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except grpc.RpcError as e:
            done.put(refusal_of(e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield done
    thread.join(BOUND)
    assert not thread.is_alive()


def copy_kits(kits: Path, to: Path) -> Path:
    """Kits that a test may change."""
    shutil.copytree(kits, to)
    return to


def kit(kits: Path, name: str) -> Kit:
    return load_kit(kits / name, role=None)
