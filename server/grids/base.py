"""What all wrapping grids share: they are Flower grids around another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.flower import NodeInfo, Run


def stream_replies(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
    """Replies one by one as they arrive, where the grid can do that; else after the last has arrived."""
    stream = getattr(grid, "stream", None)
    if stream is not None:
        yield from stream(messages, timeout=timeout)
    else:
        yield from grid.send_and_receive(messages=messages, timeout=timeout)


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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        return self._inner.pull_messages(message_ids)
