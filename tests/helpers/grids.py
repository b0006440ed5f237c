"""A grid whose answers a test writes itself, and the messages to send over any grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from numpy.typing import NDArray

from common.flower import ARRAYS, METRICS, WEIGHT, prepare_process, stamp, to_record

Arrays = Mapping[str, NDArray[Any]]


def update(arrays: Arrays, weight: Any = 1.0, **metrics: Any) -> RecordDict:
    """The content of a client's reply."""
    return RecordDict({ARRAYS: to_record(arrays), METRICS: MetricRecord({WEIGHT: weight, **metrics})})


def train_messages(arrays: Arrays, nodes: Sequence[int]) -> list[Message]:
    """One training message for each node, all with the same record of arrays."""
    prepare_process()
    record = to_record(arrays)
    return [
        stamp(Message(RecordDict({ARRAYS: record}), node, "train"), message_id=f"to-{node}-{i}")
        for i, node in enumerate(nodes)
    ]


class ScriptedGrid(Grid):
    """Passes messages to `answer`, which yields what comes back, in any order."""

    def __init__(self, answer: Callable[[list[Message]], Iterable[Message]], nodes: Sequence[int] = ()) -> None:
        prepare_process()
        self._answer = answer
        self.nodes = list(nodes)
        self.timeouts: list[float | None] = []
        self.sent: list[Message] = []
        self._counter = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        sent = [stamp(message, message_id=f"s{next(self._counter)}") for message in messages]
        self.timeouts.append(timeout)
        self.sent += sent
        yield from self._answer(sent)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._pushed |= {reply.metadata.reply_to_message_id: reply for reply in self.stream(messages)}
        return list(self._pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._pushed.pop(i) for i in list(message_ids)]

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=f"node-{node}") for node in self.nodes]

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


def echo_plus_one(message: Message, weight: float = 1.0) -> Message:
    """A sound reply: all arrays one higher, with the node's id as loss."""
    arrays = {name: array.numpy() + np.float32(1) for name, array in message.content.array_records[ARRAYS].items()}
    return Message(update(arrays, weight, train_loss=float(message.metadata.dst_node_id)), reply_to=message)
