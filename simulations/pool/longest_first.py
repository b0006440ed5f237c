"""Which client a worker is given first: who takes longest, so that no worker is left alone with it at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message

from common.data.population import StoredPopulation
from common.flower import from_record
from common.schema import Federation
from server.grids.base import FIRST_NODE
from server.grids.spooling import IN_MEMORY_BYTES
from simulations.chunks import CHUNK, PARTITIONS

SizeOf = Callable[[int], int]
"""How many training examples a client has, by its partition; 0 where nobody knows before it is made."""

MOST_REMEMBERED: Final = 1 << 16
"""Clients whose seconds are kept; a population can be far larger."""

_LEAST_AHEAD: Final = 4
"""Messages a worker among which the longest is looked for, however large the replies."""


def examples_of(federation: Federation) -> SizeOf:
    """The number of training examples of each client, without making it."""
    clients = federation.clients
    if isinstance(clients, StoredPopulation):
        return clients.train_size
    if isinstance(clients, tuple):
        return lambda partition: len(clients[partition].train)
    return lambda _partition: 0


class LongestFirst:
    """Orders messages by how long their clients are likely to take.

    That is what they took the last time; else, by what others took for an example, their examples; else the mean. The
    order decides nothing but how long a round takes.
    """

    def __init__(self, examples: SizeOf | None = None) -> None:
        """Nothing was measured yet.

        Args:
            examples: How many each client has; None knows of nobody.
        """
        self._examples = examples or (lambda _partition: 0)
        self._seconds: dict[int, float] = {}

    def arrange(self, messages: Sequence[Message], *, workers: int) -> deque[Message]:
        """The messages, longest first, ties in their own order.

        Whoever adds up replies does so in the order of the cohort, and keeps those that come before their turn. So only
        as many messages change places as have replies that fit in memory: the longest of the first ones, then the
        longest of the next. One worker takes them as they are.
        """
        if workers == 1 or len(messages) <= workers:
            return deque(messages)
        ahead = max(_LEAST_AHEAD * workers, IN_MEMORY_BYTES // max(1, _size(messages[0])))
        cost = self._costs()
        costs = [sum(map(cost, partitions_of(message))) for message in messages]
        arranged: deque[Message] = deque()
        for begin in range(0, len(messages), ahead):
            places = range(begin, min(begin + ahead, len(messages)))
            arranged.extend(messages[place] for place in sorted(places, key=lambda place: -costs[place]))
        return arranged

    def took(self, message: Message, seconds: float) -> None:
        """Remember what a message took; the members of a chunk share it, by their examples."""
        partitions = partitions_of(message)
        sizes = [max(1, self._examples(partition)) for partition in partitions]
        for partition, size in zip(partitions, sizes, strict=True):
            self._seconds.pop(partition, None)
            self._seconds[partition] = seconds * size / sum(sizes)  # last in the dictionary
        while len(self._seconds) > MOST_REMEMBERED:
            del self._seconds[next(iter(self._seconds))]

    def _costs(self) -> Callable[[int], float]:
        """A client's likely seconds; where none were ever measured, its examples."""
        if not self._seconds:
            return lambda partition: float(self._examples(partition))
        sizes = [(self._examples(partition), seconds) for partition, seconds in self._seconds.items()]
        mean = sum(seconds for _, seconds in sizes) / len(sizes)
        known = [(size, seconds) for size, seconds in sizes if size]
        an_example = sum(seconds for _, seconds in known) / sum(size for size, _ in known) if known else 0.0

        def cost(partition: int) -> float:
            if (seconds := self._seconds.get(partition)) is not None:
                return seconds
            return an_example * self._examples(partition) or mean

        return cost


def partitions_of(message: Message) -> list[int]:
    """The clients that a message is for: one, or the members of a chunk."""
    chunk = message.content.get(CHUNK)
    if isinstance(chunk, ConfigRecord):
        members = chunk.get(PARTITIONS)
        if isinstance(members, bytes):
            return [int(partition) for partition in np.frombuffer(members, np.int64)]
    return [message.metadata.dst_node_id - FIRST_NODE]


def _size(message: Message) -> int:
    """Bytes of a message's arrays; its reply has as many."""
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return sum(values.nbytes for record in records for values in from_record(record).values())
