"""How messages reach clients over the places of Flower's runtime, and what a process of a cluster answers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.errors import FailureCode, RunError
from common.flower import ARRAYS, arrays_of, failure_of, from_record, to_record
from common.transport.records import decode_records, encode_records
from server.grids.base import FIRST_NODE, TransportGrid
from simulations.cluster.actor import Answer, ClientActor
from simulations.cluster.runtime import ClusterBackend, ClusterGrid
from simulations.states import ClientStates

NAMES = ["a", "b", "c", "d", "e"]


class Pool:
    """Answers as `behaviour` says; counts who was asked."""

    def __init__(self, behaviour: Any) -> None:
        self._behaviour = behaviour
        self.asked: list[tuple[int, float | None]] = []
        self.closed = False

    def answer(  # noqa: PLR0917
        self, node: int, message_id: str, message_type: str, content: RecordDict, state: bytes, timeout: float | None
    ) -> Answer:
        self.asked.append((node, timeout))
        answer: Answer = self._behaviour(node, content, state)
        return answer

    @property
    def size(self) -> int:
        return 1

    def close(self) -> None:
        self.closed = True


class Runtime(TransportGrid):
    """Flower's runtime, as far as it can be seen: answers one message a look, the last one first."""

    def __init__(self, pool: Pool, places: int) -> None:
        super().__init__([str(i) for i in range(places)])
        self._backend = ClusterBackend({}, pool=pool)  # type: ignore[arg-type]
        self._waiting: dict[str, Message] = {}
        self.most = 0

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"flower-{len(self._waiting)}-{message.metadata.dst_node_id}"
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        self.most = max(self.most, len(self._waiting))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        _, message = self._waiting.popitem()
        context = Context(
            run_id=1, node_id=message.metadata.dst_node_id, node_config={}, state=RecordDict(), run_config={}
        )
        reply, after = self._backend.process_message(message, context)
        assert after is context
        return [reply]


def request(node: int) -> Message:
    """A message with a model."""
    content = RecordDict({ARRAYS: to_record({"w": np.arange(3.0)}), "config": ConfigRecord({"x": 1})})
    return Message(content, node, "train")


def echo(node: int, content: RecordDict, state: bytes) -> Answer:
    """The model plus the node's id."""
    arrays = {name: values + node for name, values in arrays_of(content).items()}
    reply = RecordDict({ARRAYS: to_record(arrays)})
    return Answer(error=None, content=b"".join(encode_records(reply)), state=state + b"x")


def test_more_clients_than_places_are_all_answered(tmp_path: Path) -> None:
    """Each by itself, whatever the order; never are more messages on the way than there are places."""
    pool = Pool(echo)
    runtime = Runtime(pool, places=2)
    grid = ClusterGrid(runtime, NAMES, places=2)
    nodes = list(grid.get_node_ids())
    replies = list(grid.stream([request(node) for node in nodes], timeout=3.0))
    assert runtime.most == 2
    assert {reply.metadata.src_node_id for reply in replies} == set(nodes)
    for reply in replies:
        np.testing.assert_array_equal(arrays_of(reply.content)["w"], np.arange(3.0) + reply.metadata.src_node_id)
        assert list(reply.content) == [ARRAYS]
    assert {timeout for _, timeout in pool.asked} == {3.0}


def test_states_stay_with_their_client(tmp_path: Path) -> None:
    """In the run's own store, from message to message."""
    states = ClientStates(tmp_path / "states.db")
    grid = ClusterGrid(Runtime(Pool(echo), places=2), NAMES, places=2, states=states)
    for node in (FIRST_NODE, FIRST_NODE, FIRST_NODE + 3):
        list(grid.stream([request(node)]))
    assert [states.read(i) for i in range(4)] == [b"xx", None, None, b"x"]
    states.close()


def test_failures_keep_their_reasons() -> None:
    """A lost client is a typed reply; the others go on."""

    def behaviour(node: int, content: RecordDict, state: bytes) -> Answer:
        lost = FailureCode.CLIENT_LOST
        if node == FIRST_NODE + 1:
            return Answer(error=(int(lost), lost.sentence), content=b"", state=b"")
        return echo(node, content, state)

    grid = ClusterGrid(Runtime(Pool(behaviour), places=2), NAMES, places=2)
    replies = grid.send_and_receive([request(node) for node in grid.get_node_ids()])
    fates = {reply.metadata.src_node_id - FIRST_NODE: failure_of(reply) for reply in replies}
    assert fates == {0: None, 1: FailureCode.CLIENT_LOST, 2: None, 3: None, 4: None}


def test_a_cluster_without_processes_ends_the_run() -> None:
    """With an error that can be acted on, rather than a round of failed clients after the other."""

    def behaviour(node: int, content: RecordDict, state: bytes) -> Answer:
        raise RunError("the Ray cluster has no process left")

    grid = ClusterGrid(Runtime(Pool(behaviour), places=2), NAMES, places=2)
    with pytest.raises(RunError, match="no process left") as caught:
        list(grid.stream([request(FIRST_NODE)]))
    assert "--resume" in caught.value.hint


def test_an_interrupted_run_waits_for_nobody() -> None:
    """The runtime's threads have ended, and a message on the way will not be answered."""
    grid = ClusterGrid(Runtime(Pool(echo), places=2), NAMES, places=2, stopped=lambda: True)
    with pytest.raises(RunError, match="interrupted"):
        list(grid.stream([request(node) for node in grid.get_node_ids()]))


def test_the_pool_ends_with_the_runtime() -> None:
    """Nobody waits for it any more."""
    pool = Pool(echo)
    ClusterBackend({}, pool=pool).terminate()  # type: ignore[arg-type]
    assert pool.closed


class TestProcess:
    """One process, which any client may reach."""

    def test_it_answers_as_the_client_that_is_asked(self) -> None:
        """With the context of its partition and the state that it kept."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            seen = int(str(context.state.config_records["own"]["seen"])) if context.state else 0
            context.state["own"] = ConfigRecord({"seen": seen + 1})
            told = ConfigRecord({"partition": context.node_config["partition-id"], "seen": seen})
            return Message(RecordDict({"told": told, ARRAYS: message.content[ARRAYS]}), reply_to=message)

        actor = ClientActor(lambda: app)
        actor.start()
        shared = np.frombuffer(b"".join(encode_records(RecordDict({ARRAYS: to_record({"w": np.ones(2)})}))), np.uint8)
        own = b"".join(encode_records(RecordDict({"config": ConfigRecord({"x": 1})})))
        state = b""
        for seen in range(3):
            answer = actor.answer(FIRST_NODE + 7, "m1", "train", own, state, "1", shared)
            content = decode_records(answer.content)
            assert dict(content.config_records["told"]) == {"partition": 7, "seen": seen}
            np.testing.assert_array_equal(from_record(content.array_records[ARRAYS])["w"], np.ones(2))
            state = answer.state

    def test_it_types_failures_and_says_nothing_else(self) -> None:
        """An exception's text can quote data."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            raise RuntimeError("secret: 17")

        actor = ClientActor(lambda: app)
        actor.start()
        answer = actor.answer(FIRST_NODE, "m1", "train", b"".join(encode_records(RecordDict())), b"", "", None)
        assert answer.error == (int(FailureCode.CLIENT_FAILED), FailureCode.CLIENT_FAILED.sentence)
        assert answer.content == b""

    def test_it_looks_round_before_it_loads_anything(self) -> None:
        """A process of a node that must not serve makes no app."""

        def refuse() -> None:
            raise RunError("not here")

        made: list[ClientApp] = []
        actor = ClientActor(lambda: made.append(ClientApp()) or made[0], refuse)
        with pytest.raises(RunError):
            actor.start()
        assert not made
