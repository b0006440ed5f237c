"""Asynchronous rounds without a coordinator: clients that are functions, and that answer in the order a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from torch import nn

from common.config import RunConfig
from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, ROUND, answering, arrays_of, config_of, failure_reply, to_record, update_reply
from server.asking.base import Answers, Call
from server.asking.buffered import BufferedAsking
from server.grids.base import TransportGrid
from server.grids.broadcast import Broadcast
from server.job import Job, Observer

Arrays = dict[str, NDArray[Any]]
Client = Callable[[str, Arrays, int], tuple[Arrays, dict[str, float]] | FailureCode | RecordDict]
"""A client's weights and metrics, by its name, the model and the round that it was asked in; or why it fails; or
anything else that it answers."""

START: Arrays = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "count": np.array(3)}


def contracting(name: str, model: Arrays, server_round: int) -> tuple[Arrays, dict[str, float]]:
    """Moves each weight by a part of its way to the client's own number, which is also its number of examples."""
    own = float(int(name.removeprefix("c")) + 1)
    trained = {"w": (model["w"] + np.float32(0.25) * (np.float32(own) - model["w"])), "count": model["count"] + 5}
    return trained, {"num-examples": own, "train_loss": own / 10}


def equally(name: str, model: Arrays, server_round: int) -> tuple[Arrays, dict[str, float]]:
    """The same, with the weight of clients that count alike."""
    trained, metrics = contracting(name, model, server_round)
    return trained, {**metrics, "num-examples": 1.0}


def _age_and_name(order: tuple[str, int]) -> tuple[int, str]:
    return order[1], order[0]


class Arriving(TransportGrid):
    """Answers one message at a time: that which `first` picks of those that are outstanding, given as (name, round)."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        client: Client = contracting,
        first: Callable[[list[tuple[str, int]]], int] = lambda waiting: waiting.index(min(waiting, key=_age_and_name)),
    ) -> None:
        super().__init__(names)
        self.client, self.first = client, first
        self.names = {node.node_id: node.name for node in self._nodes}
        self.waiting: dict[str, Message] = {}
        self.asked: list[tuple[str, int]] = []
        """Every message that was sent, as (name, round of the model in it)."""
        self.requests: dict[tuple[str, int], tuple[dict[str, Any], Arrays]] = {}
        """What was sent last as such: configuration and model."""
        self.arrived: list[tuple[str, int]] = []
        self.cancelled: list[str] = []
        self.timeouts: list[float | None] = []

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        raise AssertionError("an asynchronous run asks nobody to wait for")

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        ids = []
        for message in messages:
            key = self.key(message)
            ids.append(f"{key[0]}/{key[1]}/{len(self.asked)}")
            self.waiting[ids[-1]] = message
            self.asked.append(key)
            copied = {name: values.copy() for name, values in arrays_of(message.content).items()}
            self.requests[key] = (dict(config_of(message.content)), copied)
            self.timeouts.append(timeout)
        return ids

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        ids = [message_id for message_id in message_ids if message_id in self.waiting]
        if not ids:
            return []
        chosen = ids[self.first([self.key(self.waiting[message_id]) for message_id in ids])]
        message = self.waiting.pop(chosen)
        self.arrived.append(self.key(message))
        return [answering(self.answer(message), chosen)]

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        for message_id in list(message_ids):
            self.cancelled.append(self.key(self.waiting.pop(message_id))[0])

    def key(self, message: Message) -> tuple[str, int]:
        """Whom a message is for, and of which round its model is."""
        said = config_of(message.content)[ROUND]
        assert isinstance(said, int)
        return self.names[message.metadata.dst_node_id], said

    def answer(self, message: Message) -> Message:
        """What the client says to it."""
        name, server_round = self.key(message)
        said = self.client(name, arrays_of(message.content), server_round)
        if isinstance(said, FailureCode):
            return failure_reply(message, said)
        if isinstance(said, RecordDict):
            return Message(said, reply_to=message)
        return update_reply(message, *said)


class Steps:
    """What the coordinator does with plain averaging: the model becomes what the one reply holds."""

    def __init__(self, config: RunConfig, grid: TransportGrid, *, start: Arrays = START, told: bool = False) -> None:
        self.config, self.grid, self.told = config, grid, told
        self.asking = BufferedAsking(Job(config=config, model=nn.Linear(1, 1)))
        self.model = {name: values.copy() for name, values in start.items()}
        self.nodes = {node.name: node.node_id for node in grid.get_nodes()}
        self.done = 0
        self.cohorts: list[list[str]] = []
        self.calls: list[Call] = []
        self.answers: list[Answers] = []
        self.metrics: list[dict[str, Any]] = []

    def step(self, drawn: Sequence[str] | None = None) -> Answers:
        """One round; of everybody, unless a test draws."""
        number = self.done + 1
        cohort = self.asking.cohort(number, sorted(self.nodes) if drawn is None else list(drawn))
        record = ConfigRecord({ROUND: number, "run": "text"} | ({"cohort": json.dumps(cohort)} if self.told else {}))
        call = Call(
            server_round=number, cohort=cohort, nodes=self.nodes, grid=self.grid, record=record,
            timeout=self.config.cohort.deadline_seconds or None, observer=Observer(),
        )  # fmt: skip
        content = RecordDict({ARRAYS: to_record(self.model), CONFIG: record})
        nodes = [self.nodes[name] for name in cohort if name in self.nodes]
        messages = Broadcast(Message(content, nodes[0], "train"), nodes) if nodes else []
        answers = self.asking.ask(call, messages, self.model)
        if answers.enough:
            (reply,) = answers.replies
            for name, values in arrays_of(reply.content).items():
                self.model[name][...] = values  # in place, as the coordinator's model is
            self.metrics.append(dict(reply.content["metrics"]))
        self.done = number
        self.cohorts.append(cohort)
        self.calls.append(call)
        self.answers.append(answers)
        return answers

    def resumed(self, grid: TransportGrid) -> Steps:
        """The same run in another process, after the last step."""
        other = Steps(self.config, grid, start=self.model, told=self.told)
        state = {name: values.copy() for name, values in self.asking.state().items()}
        other.asking.restore(state, server_round=self.done)
        other.done = self.done
        return other


def names_of(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]


def fedbuff(
    start: Arrays,
    asked: Sequence[tuple[str, int]],
    arrived: Sequence[tuple[str, int]],
    *,
    buffer_size: int,
    exponent: float,
    by_examples: bool,
    client: Callable[[str, Arrays, int], tuple[Arrays, dict[str, float]]] = contracting,
) -> list[Arrays]:
    """FedBuff written down once more, from its pseudo-code: the models after each step, in float64.

    Args:
        start: The starting model.
        asked: (client, step) in the order in which clients began; step t begins with the t-th model, from 1.
        arrived: The same in the order in which they ended.
        buffer_size: Updates of a step.
        exponent: Of staleness.
        by_examples: Whether clients with more examples count for more.
        client: What a client makes of a model.
    """
    assert set(arrived) <= set(asked)
    models: list[Arrays] = [start]
    total = {name: np.zeros(values.shape) for name, values in start.items()}
    weight, inside = 0.0, 0
    for name, began in arrived:
        base = models[began - 1]
        trained, metrics = client(name, base, began)
        w = metrics["num-examples"] if by_examples else 1.0
        age = len(models) - began
        for key in total:
            total[key] += w * (1.0 + age) ** (-exponent) * (trained[key].astype(float) - base[key].astype(float))
        weight, inside = weight + w, inside + 1
        if inside == buffer_size:
            new = {key: models[-1][key].astype(float) + total[key] / weight for key in total}
            models.append(
                {key: (np.rint(values) if start[key].dtype.kind == "i" else values).astype(start[key].dtype)
                 for key, values in new.items()}
            )  # fmt: skip
            total = {name: np.zeros(values.shape) for name, values in start.items()}
            weight, inside = 0.0, 0
    return models[1:]


def asynchronous(*, size: int = 0, **changes: Any) -> RunConfig:
    """A run of many rounds whose buffer holds two updates; `size` clients are at work at a time."""
    tables: dict[str, Any] = {
        "rounds": 100,
        "model": {"name": "tiny"},
        "data": {"name": "blobs"},
        "cohort": {"size": size},
        "asynchronous": {"buffer_size": 2},
    }
    for key, value in changes.items():
        tables[key] = {**tables.get(key, {}), **value}
    return RunConfig.model_validate(tables)


def as_bytes(arrays: Arrays) -> dict[str, tuple[str, bytes]]:
    return {name: (str(values.dtype), values.tobytes()) for name, values in arrays.items()}
