"""A grid whose answers a test writes itself, and the messages to send over any grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.flower import ARRAYS, METRICS, WEIGHT, NodeInfo, prepare_process, stamp, to_record
from simulations.inline import InlineGrid

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


class ScriptedGrid(InlineGrid):
    """Passes messages to `answer`, which yields what comes back, in any order."""

    def __init__(self, answer: Callable[[list[Message]], Iterable[Message]], nodes: Sequence[int] = ()) -> None:
        super().__init__(_Script(answer), [])
        self.nodes = list(nodes)
        self.timeouts: list[float | None] = []
        self.sent: list[Message] = []

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        self.timeouts.append(timeout)
        self.sent += messages
        yield from super().stream(messages, timeout=timeout)

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=f"node-{node}") for node in self.nodes]


class _Script:
    """An engine that a test writes itself."""

    def __init__(self, answer: Callable[[list[Message]], Iterable[Message]]) -> None:
        self._answer = answer

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:
        yield from self._answer(list(messages))

    def close(self) -> None:
        """Nothing to let go of."""
