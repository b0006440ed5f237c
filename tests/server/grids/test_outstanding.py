"""What every grid promises of messages that are outstanding: they are answered once, in the grid's own time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, arrays_of, failure_of, failure_reply, to_record
from common.models.weights import ModelWeights
from server.grids.outstanding import OutstandingGrid, cancel, pull, push
from server.roster import CohortView
from simulations.inline import InlineGrid, InProcess, app_factory
from simulations.pool.pool import WorkerPool
from simulations.sealing import Sealing
from tests.helpers.grids import ScriptedGrid, train_messages, update
from tests.helpers.plane import BOUND, SITES, make_kits, running_plane
from tests.helpers.runs import as_bytes, configuration, prepared
from tests.helpers.sealed_sites import SealedSite, messages_to, refusing, sealed_plane

Arrays = Mapping[str, Any]
MODEL = {"w": np.arange(6, dtype=np.float32)}


class World:
    """A grid with three clients at least, and what a message to one of them has to be answered by."""

    def __init__(
        self,
        grid: Grid,
        ask: Callable[[Sequence[int], float], list[Message]],
        answer: Callable[[int, float], Arrays],
        troubled: Callable[[], Message],
    ) -> None:
        self.grid, self.ask, self.answer, self.troubled = grid, ask, answer, troubled

    def drained(self, ids: Iterable[str]) -> list[Message]:
        """Replies until each has come, each read when it comes; questions wait by themselves."""
        left, replies, end = list(ids), [], time.monotonic() + BOUND
        while left and time.monotonic() < end:
            for reply in pull(self.grid, left, needed=len(left)):
                left.remove(reply.metadata.reply_to_message_id)
                replies.append(reply)
        assert not left, "not all were answered"
        return replies

    def fits(self, reply: Message, client: int, shift: float) -> bool:
        return as_bytes(dict(arrays_of(reply.content))) == as_bytes(dict(self.answer(client, shift)))


@contextmanager
def inline_world(folder: Path, *, workers: int, sealed: bool) -> Iterator[World]:
    run = prepared(folder, data={"name": "blobs"})
    config, names = configuration(data={"name": "blobs"}), [client.name for client in run.federation.clients]
    start = ModelWeights(run.model).copy()
    sealing = Sealing.for_clients(names) if sealed else None
    factory = app_factory(run.sites, sealing.clients if sealing else None)
    engine = WorkerPool(factory, workers) if workers > 1 else InProcess(factory)
    bare = InlineGrid(engine, names)

    def content(shift: float, text: str = "") -> RecordDict:
        said = ConfigRecord({"run": text or config.canonical_json(), "server-round": 1})
        return RecordDict({ARRAYS: to_record({n: v + np.float32(shift) for n, v in start.items()}), CONFIG: said})

    def ask(clients: Sequence[int], shift: float) -> list[Message]:
        shared = content(shift)
        return [Message(shared, 2 + client, "train") for client in clients]

    def answer(client: int, shift: float) -> Arrays:
        other = InlineGrid(InProcess(app_factory(run.sites)), names)
        (reply,) = other.send_and_receive([Message(content(shift), 2 + client, "train")])
        return arrays_of(reply.content)

    def troubled() -> Message:
        other = configuration(data={"name": "blobs"}, training={"learning_rate": 0.5})
        return Message(content(0.0, other.canonical_json()), 3, "train")

    grid = sealing.around(bare, run.config) if sealing else bare
    try:
        yield World(grid, ask, answer, troubled)
    finally:
        engine.close()


@contextmanager
def plane_world(folder: Path) -> Iterator[World]:
    def app(message: Message) -> Message:
        from tests.helpers.sealed_sites import doubled

        return refusing(message) if arrays_of(message.content)["w"][0] < 0 else doubled(message)

    def model(shift: float) -> dict[str, Any]:
        return {"w": MODEL["w"] + np.float32(shift)}

    with running_plane(make_kits(folder / "kits"), folder / "plane") as plane:
        for name in SITES:
            SealedSite(plane, name, app)
        yield World(
            sealed_plane(plane),
            lambda clients, shift: messages_to(model(shift), *(SITES[i] for i in clients)),
            lambda client, shift: {"w": 2 * model(shift)["w"]},
            lambda: messages_to(model(-1.0), SITES[1])[0],
        )


WORLDS: dict[str, Callable[[Path], Any]] = {
    "in process": lambda folder: inline_world(folder, workers=1, sealed=False),
    "two workers": lambda folder: inline_world(folder, workers=2, sealed=False),
    "sealed": lambda folder: inline_world(folder, workers=1, sealed=True),
    "sealed, two workers": lambda folder: inline_world(folder, workers=2, sealed=True),
    "plane": plane_world,
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Each transport in turn."""
    with ExitStack() as stack:
        yield stack.enter_context(WORLDS[str(request.param)](tmp_path))


class TestEveryTransport:
    def test_says_that_it_is_one(self, world: World) -> None:
        """Also a wrapped one: it can be told how long to wait, how much is needed, and to stop."""
        assert isinstance(world.grid, OutstandingGrid)
        assert isinstance(CohortView(world.grid, [2]), OutstandingGrid)

    def test_answers_each_message_once(self, world: World) -> None:
        """One id a message, in their order; what comes back names it, and is what the client made of that message."""
        ids = push(world.grid, world.ask([0, 1, 2], 0.0))
        assert len(set(ids)) == 3
        replies = {reply.metadata.reply_to_message_id: reply for reply in self.read(world, ids)}
        for client, message_id in enumerate(ids):
            assert replies[message_id].metadata.src_node_id == 2 + client
        assert pull(world.grid, ids, needed=3) == []

    def read(self, world: World, ids: Sequence[str], shift: float = 0.0) -> list[Message]:
        replies = world.drained(ids)
        assert all(world.fits(reply, reply.metadata.src_node_id - 2, shift) for reply in replies)
        return replies

    def test_takes_more_while_others_are_outstanding(self, world: World) -> None:
        """Each is answered from the model that it carried, whatever was sent between."""
        first = push(world.grid, world.ask([0, 1], 0.0))
        second = push(world.grid, world.ask([2], 1.0))
        answers = {}
        left = [*first, *second]
        while left:
            for reply in pull(world.grid, left, needed=1):
                left.remove(reply.metadata.reply_to_message_id)
                shift = 1.0 if reply.metadata.reply_to_message_id in second else 0.0
                answers[reply.metadata.src_node_id - 2] = world.fits(reply, reply.metadata.src_node_id - 2, shift)
        assert answers == {0: True, 1: True, 2: True}
        self.read(world, push(world.grid, world.ask([0], 2.0)), 2.0)

    def test_looks_only_at_what_is_asked_for(self, world: World) -> None:
        """Replies to other messages stay, and a message that never was has none."""
        ids = push(world.grid, world.ask([0, 1, 2], 0.0))
        self.read(world, ids[2:])
        assert pull(world.grid, ["unknown"], needed=1) == []
        self.read(world, ids[:2])

    def test_answers_nothing_that_was_cancelled(self, world: World) -> None:
        """However far it is; cancelling something else, or again, changes nothing."""
        ids = push(world.grid, world.ask([0, 1, 2], 0.0))
        cancel(world.grid, [ids[1], "unknown"])
        cancel(world.grid, [ids[1]])
        self.read(world, [ids[0], ids[2]])
        assert pull(world.grid, ids, needed=1) == []
        self.read(world, push(world.grid, world.ask([1], 0.0)))

    def test_passes_failures_with_their_reason(self, world: World) -> None:
        """A client that refuses is an error reply with its code."""
        ids = push(world.grid, [world.troubled()])
        (reply,) = world.drained(ids)
        assert failure_of(reply) in {FailureCode.INVALID_REQUEST, FailureCode.POLICY_REFUSED}

    def test_sends_nothing_for_nothing(self, world: World) -> None:
        assert push(world.grid, []) == []
        assert pull(world.grid, [], needed=1) == []


class Counted(ScriptedGrid):
    """Notes what is computed, and answers in the reverse order."""

    def __init__(self, nodes: Sequence[int] = (2, 3, 4, 5)) -> None:
        super().__init__(self.compute, nodes)
        self.computed: list[list[int]] = []

    def compute(self, messages: list[Message]) -> Iterator[Message]:
        self.computed.append([message.metadata.dst_node_id for message in messages])
        for message in reversed(messages):
            arrays = {
                name: values + message.metadata.dst_node_id for name, values in arrays_of(message.content).items()
            }
            yield Message(update(arrays), reply_to=message)


def nodes_of(replies: Iterable[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


class TestDeferred:
    def test_computes_nothing_before_it_is_asked_for(self) -> None:
        grid = Counted()
        grid.push_messages(train_messages(MODEL, [2, 3]))
        assert grid.computed == []

    def test_computes_no_more_than_is_needed(self) -> None:
        """So many side by side as the caller will take anyway: no ledger is charged for what nobody uses."""
        grid = Counted()
        ids = grid.push_messages(train_messages(MODEL, [4, 2, 5, 3]))
        assert nodes_of(grid.pull_messages(ids, needed=2)) == [4]
        assert nodes_of(grid.pull_messages(ids, needed=1)) == [2]
        assert grid.computed == [[4, 2]]
        assert nodes_of(grid.pull_messages(ids, needed=9)) == [5]
        assert grid.computed == [[4, 2], [5, 3]]

    def test_gives_replies_in_the_order_of_the_messages(self) -> None:
        """Whatever the order in which they are computed; all of them where it is not said how many are needed."""
        grid = Counted()
        ids = grid.push_messages(train_messages(MODEL, [4, 2, 5]))
        assert nodes_of(grid.pull_messages(ids)) == [4, 2, 5]
        assert grid.pull_messages(ids) == []

    def test_two_messages_to_one_client_are_two_computations(self) -> None:
        """One after the other: a client's own state goes from the first to the second."""
        grid = Counted()
        ids = grid.push_messages([*train_messages(MODEL, [2, 3]), *train_messages(MODEL, [2])])
        replies = grid.pull_messages(ids)
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert grid.computed == [[2, 3], [2]]

    def test_time_outs_are_each_messages_own(self) -> None:
        """Messages with different ones are not computed together."""
        grid = Counted()
        first = grid.push_messages(train_messages(MODEL, [2]), timeout=5.0)
        second = grid.push_messages(train_messages(MODEL, [3]))
        grid.pull_messages([*first, *second])
        assert grid.timeouts == [5.0, None]

    def test_forgets_what_is_cancelled_while_it_is_computed(self) -> None:
        """Its reply is dropped; the others come."""
        grid = Counted()
        ids = grid.push_messages(train_messages(MODEL, [2, 3, 4]))
        assert nodes_of(grid.pull_messages(ids, needed=3)) == [2]
        grid.cancel_messages([ids[1]])
        assert nodes_of(grid.pull_messages(ids, needed=2)) == [4]
        assert grid.pull_messages(ids, needed=1) == []

    def test_keeps_what_is_asked_for_later(self) -> None:
        """A reply that was computed beside others waits until somebody asks for it."""
        grid = Counted()
        ids = grid.push_messages(train_messages(MODEL, [2, 3, 4]))
        assert nodes_of(grid.pull_messages(ids[:2], needed=2)) == [2]
        assert nodes_of(grid.pull_messages(ids[2:], needed=1)) == [4]
        assert nodes_of(grid.pull_messages(ids, needed=1)) == [3]


class TestFlowersOwnGrids:
    """What is neither told how long to wait nor to stop."""

    class Flowers(Grid):
        """The five methods that a Flower grid has, and no more."""

        def __init__(self, ids: list[Any]) -> None:
            self.ids = ids

        def set_run(self, run: Any) -> None: ...
        @property
        def run(self) -> Any: ...
        def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
        def get_node_ids(self) -> Iterable[int]:
            return []

        def get_nodes(self) -> Iterable[Any]:
            return []

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return self.ids

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            (message,) = train_messages(MODEL, [2])
            return (failure_reply(message, FailureCode.CLIENT_LOST) for _ in message_ids)

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return []

    def test_a_message_that_was_not_taken_has_an_empty_id(self) -> None:
        """Flower says None for one, and nothing at all where a request was too large."""
        messages = train_messages(MODEL, [2, 3])
        assert push(self.Flowers(["a", None]), messages, timeout=1.0) == ["a", ""]
        assert push(self.Flowers([]), messages) == ["", ""]

    def test_replies_come_as_they_are(self) -> None:
        assert len(pull(self.Flowers([]), ["a", "b"], needed=1)) == 2
        cancel(self.Flowers([]), ["a"])
