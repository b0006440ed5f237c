"""Nodes that are made when somebody looks at them."""

from __future__ import annotations

import pytest

from common.names import NumberedNames
from server.grids.nodes import NodeList


def test_it_is_a_sequence_of_named_nodes() -> None:
    """Ids count from the first."""
    nodes = NodeList(["b", "a"], first=2)
    assert [(node.node_id, node.name) for node in nodes] == [(2, "b"), (3, "a")]
    assert (len(nodes), nodes[-1].name, [node.name for node in nodes[:1]]) == (2, "a", ["b"])
    with pytest.raises(IndexError):
        nodes[2]


def test_a_node_is_found_by_its_id() -> None:
    """Without looking at others; no other id has a node."""
    nodes = NodeList(NumberedNames(10_000_000), first=2)
    node = nodes.of(9_000_002)
    assert node is not None
    assert (node.node_id, node.name) == (9_000_002, "client-9000000")
    assert nodes.of(1) is None
    assert nodes.of(10_000_002) is None
