"""Who takes part: the clients that a grid reaches, by name, and the view of the grid that a strategy is given."""

from __future__ import annotations

import structlog
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from pydantic import TypeAdapter

from common.config import RunConfig
from common.config.settings import Name
from common.errors import RunError
from common.flower import CLIENT, CONFIG, ROUND, RUN, NodeInfo, config_of, failure_of
from server.grids import WrappingGrid

log = structlog.get_logger()
_NAME = TypeAdapter(Name)


class CohortView(WrappingGrid):
    """What a strategy sees of the grid: only the cohort."""

    def __init__(self, inner: Grid, node_ids: list[int]) -> None:
        super().__init__(inner)
        self._node_ids = node_ids

    def get_node_ids(self) -> list[int]:
        """The cohort's node ids, in the cohort's order."""
        return self._node_ids

    def get_nodes(self) -> list[NodeInfo]:
        """The cohort's nodes."""
        return [node for node in self._inner.get_nodes() if node.node_id in self._node_ids]


def discover(grid: Grid, config: RunConfig) -> dict[str, int]:
    """Every client's name and node id, sorted by name: node ids are random and decide nothing.

    Raises:
        RunError: No client is there, or two have the same name.
    """
    nodes = [(node.name, node.node_id) for node in grid.get_nodes()]
    if not all(name for name, _ in nodes):
        content = RecordDict({CONFIG: ConfigRecord({RUN: config.canonical_json(), ROUND: 1})})
        asked = [Message(content, node_id, MessageType.QUERY) for _, node_id in nodes]
        first: dict[int, Message] = {}
        for reply in grid.send_and_receive(asked, timeout=config.cohort.deadline_seconds or None):
            first.setdefault(reply.metadata.src_node_id, reply)  # who answers twice is heard once
        told = [(_told_name(first[node]), node) for _, node in nodes if node in first]
        nodes = [(name, node) for name, node in told if name is not None]
    roster = dict(sorted(nodes))
    if not roster or len(roster) != len(nodes):
        problem = "two clients have the same name" if roster else "no client is there"
        raise RunError(f"the run cannot start: {problem}", hint="check the clients' names and logs")
    return roster


def _told_name(reply: Message) -> str | None:
    """The name that a client tells, if it is one."""
    try:
        return _NAME.validate_python(config_of(reply.content)[CLIENT])
    except (KeyError, ValueError):  # an error reply has no content
        log.warning("client_without_name", failure=failure.slug if (failure := failure_of(reply)) else "invalid-reply")
        return None
