"""The grid over the plane: what a run asks for, sites get; what they answer comes back in order, sealed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.mods.sealed import sealed_mod
from common.crypto import Direction, Header, seal
from common.errors import FailureCode, RefusedError
from common.flower import (
    ARRAYS,
    CONFIG,
    RUN,
    arrays_of,
    client_context,
    failure_of,
    stamp,
    to_record,
    update_reply,
)
from common.transport import wire_pb2
from common.transport.sealed import Blob, order_id, read_sealed, sealed_content
from server.grids.base import FIRST_NODE
from server.grids.plane import PlaneGrid
from server.grids.sealed import SealedGrid
from simulations import inline
from tests.helpers.plane import BOUND, SITES, Agent, Plane, cut, kit, make_kits, refused, running_plane
from tests.helpers.streaming import Streaming, read_now

RUN_ID, CONFIGURATION = b"r" * 16, '{"a": 1}'
NODES = {name: FIRST_NODE + place for place, name in enumerate(SITES)}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("grid-kits") / "kits")


@pytest.fixture
def plane(kits: Path, tmp_path: Path) -> Iterator[Plane]:
    with running_plane(kits, tmp_path / "plane") as plane:
        yield plane


def grid_of(plane: Plane, **changes: Any) -> PlaneGrid:
    return PlaneGrid(plane.hub, **{"run_id": RUN_ID, "sites": list(reversed(SITES))} | changes)


def sealed_for(plane: Plane, *names: str, plain: bytes = b"model", run_id: bytes = RUN_ID) -> list[Message]:
    """One broadcast for these sites, sealed by hand."""
    coordinator = kit(plane.kits, "server")
    header = Header(
        direction=Direction.DOWN, kind=1, run_id=run_id, server_round=1, attempt=0,
        sender=coordinator.keys.record.key_id, message_id=os.urandom(16), reply_to=bytes(16),
        plaintext_bytes=len(plain), manifest=bytes(32), config_digest=bytes(32), cohort_digest=bytes(32),
        base_digest=bytes(32),
    )  # fmt: skip
    path = plane.hub.blobs / os.urandom(8).hex()
    with path.open("wb") as sink:
        sealed = seal([plain], header, sender=coordinator.keys, sink=sink, broadcast=True)
    blob = Blob.of_file(path, sealed.blob_bytes)
    return [
        Message(sealed_content(sealed.envelope_for(coordinator.sites[name]), blob), NODES[name], "train")
        for name in names
    ]


def send(agent: Agent, order: Any, blob: bytes) -> None:
    start = wire_pb2.UploadStart(message_id=order.message_id, envelope=b"of " + blob, blob_bytes=len(blob), offset=0)
    assert agent.calls.upload(start, cut(blob)).complete


def files_of(plane: Plane) -> list[str]:
    """What lies in the plane's folder but models on their way down."""
    return [path.name for path in (plane.hub.blobs.parent / "uploads").iterdir()]


def test_nodes_are_places_in_the_sorted_list_of_names(plane: Plane):
    """As simulations number them; whether a site is attached makes no difference."""
    grid = grid_of(plane)
    assert [(node.node_id, node.name) for node in grid.get_nodes()] == [(i, name) for name, i in NODES.items()]
    assert list(grid.get_node_ids()) == list(NODES.values())
    assert inline.FIRST_NODE == FIRST_NODE


def test_replies_come_in_the_order_of_the_messages(plane: Plane):
    """Whatever the order of arrival; early ones wait as files, which go when the next is asked for."""
    agents = {name: plane.attach(name) for name in SITES}
    replies = Streaming(grid_of(plane).stream(sealed_for(plane, *SITES)))
    orders = {name: agent.next("order") for name, agent in agents.items()}
    for name in reversed(SITES):
        assert replies.heard.empty()
        send(agents[name], orders[name], name.encode())
    for name in SITES:
        assert replies.next() == (NODES[name], b"of " + name.encode(), name.encode())
    assert replies.next() is None
    assert files_of(plane) == []


def test_an_order_is_named_by_its_envelope_and_fetched_by_its_digest(plane: Plane):
    """All recipients of a broadcast fetch one blob, and each order has a name of its own."""
    agents = [plane.attach(name) for name in SITES[:2]]
    messages = sealed_for(plane, *SITES[:2])
    replies = grid_of(plane).stream(messages)
    pulled = Streaming(replies)
    envelopes = [read_sealed(message.content)[0] for message in messages]
    orders = [agent.next("order") for agent in agents]
    assert [order.message_id for order in orders] == [order_id(envelope) for envelope in envelopes]
    assert [order.envelope for order in orders] == envelopes
    blobs = {b"".join(agent.calls.fetch(order.blob_digest)) for agent, order in zip(agents, orders, strict=True)}
    assert len(blobs) == 1
    for agent, order in zip(agents, orders, strict=True):
        agent.fail(order.message_id, FailureCode.CLIENT_FAILED)
    for _ in SITES[:2]:
        assert failure_of(pulled.next()) is FailureCode.CLIENT_FAILED


def test_failures_come_at_once(plane: Plane):
    """They do not wait for their place, and hold up nobody."""
    agents = {name: plane.attach(name) for name in SITES}
    replies = Streaming(grid_of(plane).stream(sealed_for(plane, *SITES)))
    orders = {name: agent.next("order") for name, agent in agents.items()}
    agents[SITES[2]].fail(orders[SITES[2]].message_id, FailureCode.BUDGET_EXHAUSTED)
    failure = replies.next()
    assert (failure.metadata.src_node_id, failure_of(failure)) == (NODES[SITES[2]], FailureCode.BUDGET_EXHAUSTED)
    for name in SITES[:2]:
        send(agents[name], orders[name], name.encode())
        assert replies.next()[0] == NODES[name]
    assert replies.next() is None


class Clock:
    """The grid's clock, which a test can move on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_who_does_not_answer_in_time_fails_and_is_told_to_stop(plane: Plane, monkeypatch: pytest.MonkeyPatch):
    """A site that never attached, too; what came before the time-out counts."""
    clock, late = Clock(), []
    monkeypatch.setattr("server.grids.plane.time", clock)
    answering, slow = plane.attach(SITES[0]), plane.attach(SITES[1])
    replies = Streaming(grid_of(plane, on_late=late.append).stream(sealed_for(plane, *SITES), timeout=BOUND))
    order, other = answering.next("order"), slow.next("order")
    assert 0 < other.seconds_left <= BOUND
    send(answering, order, b"in time")
    assert replies.next()[2] == b"in time"
    clock.ahead = BOUND
    assert {failure_of(replies.next()) for _ in range(2)} == {FailureCode.DEADLINE_EXCEEDED}
    assert replies.next() is None
    assert slow.next("cancel").message_id == other.message_id
    start = wire_pb2.UploadStart(message_id=other.message_id, envelope=b"e", blob_bytes=1)
    assert refused(lambda: slow.calls.upload(start, [b"x"])) == "unknown-order"
    assert late == [SITES[1]]


def test_what_came_in_time_counts_however_late_it_is_taken(plane: Plane, monkeypatch: pytest.MonkeyPatch):
    """Folding one reply may take longer than the time that is left for the next."""
    clock = Clock()
    monkeypatch.setattr("server.grids.plane.time", clock)
    agents = {name: plane.attach(name) for name in SITES}
    stream = grid_of(plane).stream(sealed_for(plane, *SITES), timeout=BOUND)
    first: list[Any] = []
    puller = threading.Thread(target=lambda: first.append(read_now(next(stream))))
    puller.start()
    orders = {name: agent.next("order") for name, agent in agents.items()}
    for name in SITES[:2]:
        send(agents[name], orders[name], name.encode())
    puller.join(BOUND)
    plane.seen.wait_for("answer-received", count=2)
    clock.ahead = BOUND
    rest = [reply if reply.has_error() else read_now(reply)[2] for reply in stream]
    assert (first[0][2], rest[0]) == (SITES[0].encode(), SITES[1].encode())
    assert failure_of(rest[1]) is FailureCode.DEADLINE_EXCEEDED


def test_enough_updates_end_a_call(plane: Plane):
    """Stragglers fail, are told to stop, and are reported when they come nevertheless."""
    agents = {name: plane.attach(name) for name in SITES}
    replies = Streaming(grid_of(plane, enough=2).stream(sealed_for(plane, *SITES)))
    orders = {name: agent.next("order") for name, agent in agents.items()}
    for name in SITES[1:]:
        send(agents[name], orders[name], name.encode())
    assert failure_of(replies.next()) is FailureCode.DEADLINE_EXCEEDED
    assert [replies.next()[0] for _ in range(2)] == [NODES[name] for name in SITES[1:]]
    assert replies.next() is None
    assert agents[SITES[0]].next("cancel").message_id == orders[SITES[0]].message_id
    assert files_of(plane) == []


def test_a_stream_that_is_closed_early_leaves_nothing(plane: Plane):
    """Open orders are cancelled, and what has arrived is removed."""
    agents = {name: plane.attach(name) for name in SITES}
    stream = grid_of(plane).stream(sealed_for(plane, *SITES))
    taken: list[Any] = []
    puller = threading.Thread(target=lambda: taken.append(read_now(next(stream))))
    puller.start()
    orders = {name: agent.next("order") for name, agent in agents.items()}
    for name in (SITES[1], SITES[0]):
        send(agents[name], orders[name], name.encode())
    puller.join(BOUND)
    stream.close()
    assert taken[0][0] == NODES[SITES[0]]
    assert agents[SITES[2]].next("cancel").message_id == orders[SITES[2]].message_id
    assert files_of(plane) == []
    assert not list(plane.hub.book.waiting())


def test_a_run_that_is_stopped_ends_its_stream(plane: Plane):
    """`check` is asked while a call waits; what it raises ends the call, and cancels its orders."""

    class StoppedError(Exception):
        pass

    stop, agent = threading.Event(), plane.attach(SITES[0])

    def check() -> None:
        if stop.is_set():
            raise StoppedError

    replies = Streaming(grid_of(plane, check=check).stream(sealed_for(plane, SITES[0])))
    order = agent.next("order")
    stop.set()
    assert isinstance(replies.next(), StoppedError)
    assert agent.next("cancel").message_id == order.message_id


def test_a_detached_site_keeps_its_order(plane: Plane):
    """It comes back and answers; nobody noticed."""
    replies = Streaming(grid_of(plane).stream(sealed_for(plane, SITES[0])))
    first = plane.attach(SITES[0])
    order = first.next("order")
    first.close()
    plane.seen.wait_for("detached")
    second = plane.attach(SITES[0], held=[order.message_id])
    send(second, order, b"after all")
    assert replies.next()[2] == b"after all"


def test_a_site_that_is_denied_meanwhile_is_lost_at_once(plane: Plane):
    """Its order does not wait for the time-out."""
    plane.attach(SITES[0])
    replies = Streaming(grid_of(plane).stream(sealed_for(plane, SITES[0])))
    plane.seen.wait_for("order-sent")
    plane.hub.shut_out([SITES[0]])
    assert failure_of(replies.next()) is FailureCode.CLIENT_LOST


def test_nothing_but_sealed_messages_of_this_run_are_sent(plane: Plane):
    """And if one of them is not, none is."""
    agent = plane.attach(SITES[0])
    (sealed,), grid = sealed_for(plane, SITES[0]), grid_of(plane)
    plain = Message(RecordDict({ARRAYS: to_record({"w": np.zeros(2)})}), NODES[SITES[1]], "train")
    (foreign,) = sealed_for(plane, SITES[1], run_id=b"x" * 16)
    forged = Message(sealed_content(b"no envelope", Blob.of_bytes(b"x")), NODES[SITES[1]], "train")
    for wrong in (plain, foreign, forged):
        with pytest.raises(RefusedError):
            list(grid.stream([sealed, wrong]))
    agent.beat()
    agent.next("ping")  # no order came before it


def test_a_blob_in_memory_is_written_once_and_removed(plane: Plane):
    """For a grid above that has no folder."""
    agent = plane.attach(SITES[0])
    (message,) = sealed_for(plane, SITES[0])
    envelope, blob = read_sealed(message.content)
    with blob.open() as file:
        data = file.read()
    in_memory = Message(sealed_content(envelope, Blob.of_bytes(data)), NODES[SITES[0]], "train")
    before = set(plane.hub.blobs.iterdir())
    replies = Streaming(grid_of(plane).stream([in_memory]))
    order = agent.next("order")
    assert b"".join(agent.calls.fetch(order.blob_digest)) == data
    agent.fail(order.message_id, 1001)
    replies.next()
    assert replies.next() is None
    assert set(plane.hub.blobs.iterdir()) == before


def test_all_replies_at_once_are_in_memory(plane: Plane):
    """`send_and_receive` and `push_messages` outlive the files."""
    agent = plane.attach(SITES[0])

    def answer(times: int) -> None:
        for _ in range(times):
            send(agent, agent.next("order"), b"answer")
            agent.next("receipt")

    thread = threading.Thread(target=answer, args=(2,))
    thread.start()
    grid = grid_of(plane)
    (reply,) = grid.send_and_receive(messages=sealed_for(plane, SITES[0]), timeout=BOUND)
    assert read_now(reply)[2] == b"answer"
    (pulled,) = grid.pull_messages(grid.push_messages(sealed_for(plane, SITES[0])))
    assert read_now(pulled)[2] == b"answer"
    assert grid.pull_messages(["unknown"]) == []
    thread.join(BOUND)
    assert files_of(plane) == []


class Site:
    """A real site in short: opens what is sealed for it, and seals its answer."""

    def __init__(self, plane: Plane, name: str, folder: Path, app: Callable[[Message], Message]) -> None:
        mine = kit(plane.kits, name)
        self.agent = plane.attach(name)
        self._mod = sealed_mod(lambda _context: mine.keys, mine.coordinator)
        self._app, self._folder = app, folder
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        order = self.agent.next("order")
        blob = Blob.of_bytes(b"".join(self.agent.calls.fetch(order.blob_digest)))
        message = stamp(Message(sealed_content(order.envelope, blob), 1, order.kind), message_id="m")
        context = client_context(node_id=1, partition=0)
        reply = self._mod(message, context, lambda message, _context: self._app(message))
        envelope, answer = read_sealed(reply.content)
        start = wire_pb2.UploadStart(message_id=order.message_id, envelope=envelope, blob_bytes=answer.size)
        with answer.open() as file:
            assert self.agent.calls.upload(start, iter(lambda: file.read(1 << 20), b"")).complete


def test_a_round_goes_down_and_up_sealed_end_to_end(plane: Plane, tmp_path: Path):
    """Weights through `SealedGrid`, the plane and the site's mod, and back, with real keys on real TLS."""
    server = kit(plane.kits, "server")
    digest = hashlib.sha256(CONFIGURATION.encode()).digest()
    model = {"w": np.arange(400_000, dtype=np.float32), "b": np.ones(3, np.float32)}

    def train(message: Message) -> Message:
        doubled = {name: 2 * values for name, values in arrays_of(message.content).items()}
        return update_reply(message, doubled, {"num-examples": 3.0})

    for name in SITES:
        Site(plane, name, tmp_path, train)
    grid = SealedGrid(
        grid_of(plane),
        keys=server.keys,
        records=server.sites,
        run_id=RUN_ID,
        config_digest=digest,
        folder=plane.hub.blobs,
    )
    config = ConfigRecord({RUN: CONFIGURATION, "server-round": 1})
    content = RecordDict({ARRAYS: to_record(model), CONFIG: config})
    messages = [Message(content, node, "train") for node in NODES.values()]
    nodes = []
    for reply in grid.stream(messages, timeout=BOUND):
        assert reply.has_content(), failure_of(reply)
        nodes.append(reply.metadata.src_node_id)
        for name, values in arrays_of(reply.content).items():
            np.testing.assert_array_equal(values, 2 * model[name])
    assert nodes == list(NODES.values())
    assert list(plane.hub.blobs.iterdir()) == []
    assert files_of(plane) == []


def test_a_grid_can_be_used_by_runs_side_by_side(plane: Plane):
    """Two grids over one hub do not see each other's answers."""
    agents = {name: plane.attach(name) for name in SITES[:2]}
    with ExitStack() as stack:
        streams = {}
        for name in SITES[:2]:
            run_id = name.encode()[-1:] * 16
            grid = grid_of(plane, run_id=run_id, sites=SITES)
            streams[name] = Streaming(grid.stream(sealed_for(plane, name, run_id=run_id)))
            stack.callback(streams[name].thread.join, BOUND)
        for name, agent in agents.items():
            send(agent, agent.next("order"), name.encode())
        for name, stream in streams.items():
            assert stream.next()[2] == name.encode()
            assert stream.next() is None
