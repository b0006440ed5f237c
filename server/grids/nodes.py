"""The nodes of a grid that reaches parties by name, made when somebody looks at them: there can be millions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from common.flower import NodeInfo


class NodeList(Sequence[NodeInfo]):
    """Nodes whose ids are places in a list of names, counted from `first`.

    Args:
        names: One name a node.
        first: Id of the first one.
    """

    def __init__(self, names: Sequence[str], *, first: int) -> None:
        self.names = names
        self.ids = range(first, first + len(names))

    @overload
    def __getitem__(self, index: int) -> NodeInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NodeInfo]: ...
    def __getitem__(self, index: int | slice) -> NodeInfo | Sequence[NodeInfo]:
        """See `Sequence`."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return NodeInfo(node_id=self.ids[index], name=self.names[index])

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.ids)

    def of(self, node_id: int) -> NodeInfo | None:
        """The node of an id, or None where there is no such node."""
        return self[self.ids.index(node_id)] if node_id in self.ids else None
