"""Devices, clocks and grids that a test writes itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, METRICS, ROUND, WEIGHT, failure_reply, to_record, update_reply
from server.grids.base import FIRST_NODE, TransportGrid
from server.grids.broadcast import Broadcast, Fate
from simulations.clock import ClockedGrid, Device, Timing, VirtualClock, Workload
from simulations.clock.presence import Always, Presence

WORK = Workload(download_bytes=0, upload_bytes=0, batch_size=10, local_steps=0, local_epochs=1)
"""Each client trains once on its examples, and transfers take no time."""


def device(speed: float = 1.0, *, presence: Presence | None = None, **fields: float) -> Device:
    """A device that is always there, and receives and sends at once."""
    values = {"download_mbit": float("inf"), "upload_mbit": float("inf"), "dropout": 0.0} | fields
    return Device(examples_per_second=speed, presence=presence or Always(), **values)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Devices by place."""

    devices: Sequence[Device]

    @property
    def away_at_times(self) -> bool:
        return True

    def of(self, place: int, name: str) -> Device:
        return self.devices[place]

    def presence(self, place: int, name: str) -> Presence:
        return self.devices[place].presence


def timing(*devices: Device, work: Workload = WORK, **fields: Any) -> Timing:
    """A run's timing over these devices."""
    return Timing(devices=Listed(devices=devices), workload=work, seed=0, **fields)


def names_of(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]


def messages(nodes: Sequence[int], *, server_round: int = 1) -> Broadcast:
    """A round's training messages."""
    content = RecordDict(
        {ARRAYS: to_record({"w": np.zeros(2, np.float32)}), CONFIG: ConfigRecord({ROUND: server_round})}
    )
    return Broadcast(Message(content, FIRST_NODE, "train"), list(nodes))


class Clients(TransportGrid):
    """Answers every message with the node's own number; remembers who was asked, and with which time-out."""

    def __init__(self, count: int, failing: Mapping[int, FailureCode] | None = None) -> None:
        super().__init__(names_of(count))
        self.failing = failing or {}
        self.asked: list[list[int]] = []
        self.timeouts: list[float | None] = []

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        batch = list(messages)
        self.asked.append([message.metadata.dst_node_id for message in batch])
        self.timeouts.append(timeout)
        for message in batch:
            yield self.reply(message)

    def reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.failing:
            return failure_reply(message, self.failing[node])
        return update_reply(message, {"w": np.full(2, node, np.float32)}, {WEIGHT: 1.0})


class Folding(Clients):
    """The same as a cohort."""

    declines = False

    def fold(self, messages: Broadcast, *, largest: float, timeout: float | None) -> Iterator[Fate | Message] | None:
        if self.declines:
            return None
        self.asked.append(list(messages.nodes))
        self.timeouts.append(timeout)
        return self.told(messages, largest)

    def told(self, messages: Broadcast, largest: float) -> Iterator[Fate | Message]:
        for node in messages.nodes:
            yield Fate(node_id=node, failure=self.failing.get(node))
        sound = [node for node in messages.nodes if node not in self.failing]
        if not sound:
            return
        mean = np.full(2, np.mean(sound), np.float32)
        metrics = MetricRecord({WEIGHT: float(len(sound)), "largest": largest})
        yield Message(RecordDict({ARRAYS: to_record({"w": mean}), METRICS: metrics}), reply_to=messages[0])


class Scene:
    """A clocked grid over such clients: client i is node i + 2, and has the i-th number of examples."""

    def __init__(self, rules: Timing, examples: Sequence[int], *, inner: Clients | None = None, **fields: Any) -> None:
        self.clock = VirtualClock()
        self.inner = inner or Clients(len(examples))
        self.grid = ClockedGrid(
            self.inner,
            timing=rules,
            clock=self.clock,
            names=names_of(len(examples)),
            examples=list(examples).__getitem__,
            **fields,
        )
        self.nodes = range(FIRST_NODE, FIRST_NODE + len(examples))

    def round(self, nodes: Sequence[int] | None = None, *, server_round: int = 1) -> list[Message]:
        """All replies of a round."""
        return list(self.grid.stream(messages(nodes or self.nodes, server_round=server_round)))
