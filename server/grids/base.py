"""What all wrapping grids share: they are Flower grids around another one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.flower import NodeInfo, Run, prepare_process
from server.grids.nodes import NodeList
from server.grids.outstanding import Deferred, cancel, pull, push

FIRST_NODE: Final = 2
"""Node ids from here on; 1 is the server."""


def stream_replies(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
    """Replies one by one as they arrive, where the grid can do that; else after the last has arrived."""
    stream = getattr(grid, "stream", None)
    if stream is not None:
        yield from stream(messages, timeout=timeout)
    else:
        yield from grid.send_and_receive(messages=messages, timeout=timeout)


class TransportGrid(Grid):
    """What grids share that reach parties by name. A subclass gives `stream`.

    Node ids are places in the list of names, which is kept as it is: it can be of millions that are made one by one.
    """

    def __init__(self, names: Sequence[str]) -> None:
        prepare_process()
        self._nodes = NodeList(names, first=FIRST_NODE)
        self._deferred = Deferred(lambda messages, timeout: self.stream(messages, timeout=timeout))
        self._run = Run.create_empty(run_id=1)

    @abstractmethod
    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield their replies."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies."""
        return list(self.stream(messages, timeout=timeout))

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """Have messages answered as soon as their replies are asked for; see `Deferred`."""
        return self._deferred.push(messages, timeout=timeout)

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        """Replies to messages that were pushed; the next one, where it is said how many are needed."""
        return self._deferred.pull(message_ids, needed=needed)

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """See `OutstandingGrid`."""
        self._deferred.cancel(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all, whether they can be reached or not."""
        return self._nodes.ids

    def get_nodes(self) -> Sequence[NodeInfo]:
        """All with their names, made one by one."""
        return self._nodes

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class WrappingGrid(Grid):
    """Passes everything to the grid inside. A subclass overrides `stream`."""

    def __init__(self, inner: Grid) -> None:
        self._inner = inner

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield the replies as they arrive."""
        yield from stream_replies(self._inner, messages, timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return all replies."""
        return list(self.stream(messages, timeout=timeout))

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return self._inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """See `Grid`."""
        return self._inner.get_nodes()

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:
        """See `OutstandingGrid`."""
        return push(self._inner, list(messages), timeout=timeout)

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:
        """See `OutstandingGrid`."""
        return pull(self._inner, message_ids, needed=needed)

    def cancel_messages(self, message_ids: Iterable[str]) -> None:
        """See `OutstandingGrid`."""
        cancel(self._inner, message_ids)
