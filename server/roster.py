"""Who takes part: the clients that a grid reaches, by name, and the view of the grid that a strategy is given; and what
every client is told of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import structlog
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from pydantic import TypeAdapter

from common.config import RunConfig
from common.config.settings import Name
from common.errors import DataError, RunError
from common.flower import (
    AUTHORIZATION,
    CLIENT,
    COHORT,
    CONFIG,
    ROUND,
    RUN,
    RUN_HEX,
    SCHEMA,
    NodeInfo,
    config_of,
    failure_of,
)
from common.names import SortedNames, sorted_names
from common.schema import DataSchema, read_schema
from server.grids import WrappingGrid
from server.grids.nodes import NodeList

log = structlog.get_logger()
_NAME = TypeAdapter(Name)
_FEW: Final = 1 << 14


class CohortView(WrappingGrid):
    """What a strategy sees of the grid: only the cohort."""

    def __init__(self, inner: Grid, node_ids: list[int]) -> None:
        super().__init__(inner)
        self._node_ids = node_ids

    def get_node_ids(self) -> list[int]:
        """The cohort's node ids, in the cohort's order."""
        return self._node_ids

    def get_nodes(self) -> list[NodeInfo]:
        """The cohort's nodes, in the order of the grid."""
        nodes, cohort = self._inner.get_nodes(), set(self._node_ids)
        if isinstance(nodes, NodeList):
            return [node for node_id in sorted(cohort) if (node := nodes.of(node_id)) is not None]
        return [node for node in nodes if node.node_id in cohort]


class Roster(Mapping[str, int]):
    """Every client's name and node id.

    Args:
        names: The names, sorted.
        node_ids: One a name, in the same order.

    Of more than `_FEW` clients it looks at no more names than it is asked for; a table of fewer is quicker.
    """

    def __init__(self, names: SortedNames, node_ids: Sequence[int]) -> None:
        self.names = names
        self._node_ids = node_ids
        self._table = dict(zip(names, node_ids, strict=True)) if len(names) <= _FEW else None

    def get(self, name: str, default: Any = None) -> Any:
        """A client's node id, or the default."""
        return super().get(name, default) if self._table is None else self._table.get(name, default)

    def __getitem__(self, name: str) -> int:
        """A client's node id."""
        place = self.names.place(name)
        if place is None:
            raise KeyError(name)
        return self._node_ids[place]

    def __iter__(self) -> Iterator[str]:
        """The names, ascending."""
        return iter(self.names)

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.names)


def request_record(
    config: RunConfig, *, run_id: str = "", authorization: str = "", cohort: Sequence[str] | None = None
) -> ConfigRecord:
    """What every request says of its run: the configuration, and of a run that somebody submitted by whose order."""
    record = ConfigRecord({RUN: config.canonical_json()})
    if run_id:
        record[RUN_HEX], record[AUTHORIZATION] = run_id, authorization
        if cohort is not None:
            record[COHORT] = json.dumps(list(cohort))
    return record


def discover(grid: Grid, config: RunConfig, *, run_id: str = "", authorization: str = "") -> Roster:
    """Every client's name and node id, sorted by name: node ids are random and decide nothing.

    Clients of a grid that lists them by name in order are not looked at one by one.

    Raises:
        RunError: No client is there, or two have the same name.
    """
    found = grid.get_nodes()
    if isinstance(found, NodeList) and isinstance(found.names, SortedNames) and len(found):
        return Roster(found.names, found.ids)
    nodes = [(node.name, node.node_id) for node in found]
    if not all(name for name, _ in nodes):
        asked = [node_id for _, node_id in nodes]
        replies = _ask(grid, config, asked, run_id=run_id, authorization=authorization)
        told = [(_told_name(replies[node]), node) for node in asked if node in replies]
        nodes = [(name, node) for name, node in told if name is not None]
    known = dict(sorted(nodes))
    if not known or len(known) != len(nodes):
        problem = "two clients have the same name" if known else "no client is there"
        raise RunError(f"the run cannot start: {problem}", hint="check the clients' names and logs")
    return Roster(sorted_names(known), tuple(known.values()))


def ask_schema(grid: Grid, config: RunConfig, *, run_id: str = "", authorization: str = "") -> DataSchema:
    """The public facts of a data set that the coordinator does not know itself: what all clients say of theirs.

    Guarantee: every client of the grid was asked and all said the same.

    Raises:
        DataError: A client did not answer, or two do not agree.
    """
    names = {node.node_id: node.name for node in grid.get_nodes()}
    replies = _ask(grid, config, list(names), run_id=run_id, authorization=authorization)
    found: dict[str, DataSchema] = {}
    for node, name in names.items():
        reply = replies.get(node)
        failure = failure_of(reply) if reply is not None else None
        if reply is None or failure is not None:
            why = failure.sentence if failure is not None else "it did not answer"
            raise DataError(
                f"site {name} does not say what its data set `{config.data.name}` looks like: {why}",
                hint="see that site's log; its site.toml must name the data set, and its policy allow the run",
            )
        try:
            found[name] = read_schema(str(config_of(reply.content)[SCHEMA]))
        except (KeyError, ValueError) as e:
            raise DataError(
                f"site {name} describes its data set `{config.data.name}` in a way that cannot be read",
                hint="both sides must run the same version",
            ) from e
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise DataError(
                f"sites {first} and {name} describe `{config.data.name}` differently",
                hint="`coterie data check` at both shows columns and classes; they must be equal and in the same order",
            )
    return found[first]


def _ask(grid: Grid, config: RunConfig, nodes: Sequence[int], *, run_id: str, authorization: str) -> dict[int, Message]:
    """Every node's first answer to the question who it is."""
    record = request_record(config, run_id=run_id, authorization=authorization)
    record[ROUND] = 1
    content = RecordDict({CONFIG: record})
    asked = [Message(content, node_id, MessageType.QUERY) for node_id in nodes]
    first: dict[int, Message] = {}
    for reply in grid.send_and_receive(asked, timeout=config.cohort.deadline_seconds or None):
        first.setdefault(reply.metadata.src_node_id, reply)  # who answers twice is heard once
    return first


def _told_name(reply: Message) -> str | None:
    """The name that a client tells, if it is one."""
    try:
        return _NAME.validate_python(config_of(reply.content)[CLIENT])
    except (KeyError, ValueError):  # an error reply has no content
        log.warning("client_without_name", failure=failure.slug if (failure := failure_of(reply)) else "invalid-reply")
        return None
