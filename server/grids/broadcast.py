"""One message to many nodes, and grids that train a whole cohort on it without a message for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, overload, runtime_checkable

from flwr.app import Message

from common.errors import FailureCode


class Broadcast(Sequence[Message]):
    """The same content to many nodes: a Message for each is made only where somebody looks at it.

    Args:
        template: Any of the messages; its content is everybody's, and is not copied.
        nodes: Whom it goes to, in the cohort's order.
    """

    def __init__(self, template: Message, nodes: Sequence[int]) -> None:
        self.template = template
        self.nodes = nodes

    def to(self, nodes: Sequence[int]) -> Broadcast:
        """The same to others."""
        return Broadcast(self.template, nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @overload
    def __getitem__(self, place: int) -> Message: ...
    @overload
    def __getitem__(self, place: slice) -> Broadcast: ...
    def __getitem__(self, place: int | slice) -> Message | Broadcast:
        if isinstance(place, slice):
            return self.to(self.nodes[place])
        return self._message(self.nodes[place])

    def __iter__(self) -> Iterator[Message]:
        return map(self._message, self.nodes)

    def _message(self, node: int) -> Message:
        about = self.template.metadata
        return Message(self.template.content, node, about.message_type, ttl=about.ttl, group_id=about.group_id)


class Fate(NamedTuple):  # there can be thousands a round: a dataclass takes three times as long to make
    """What became of one node's update in a cohort that was trained as a whole; None: it counts."""

    node_id: int
    failure: FailureCode | None


@runtime_checkable
class CohortGrid(Protocol):
    """A grid that can train a cohort as a whole, for strategies that need only the mean."""

    def fold(self, messages: Broadcast, *, largest: float, timeout: float | None) -> Iterator[Fate | Message] | None:
        """Every node's fate once, and last one reply that holds the mean, as `FoldingGrid` gives it, if any counts.

        An update counts by `CheckedGrid`'s rules: finite, and no value beyond `largest` or twice the model's largest.

        Args:
            messages: The cohort's.
            largest: What a value may be.
            timeout: Seconds for every answer, or None.

        Returns:
            None, decided before anything happens, where single replies shall be asked for instead.
        """
