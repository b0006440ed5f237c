"""Who takes part: clients by name, whatever their node ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from common.errors import FailureCode, RunError
from common.flower import CONFIG, NodeInfo, failure_reply
from server.roster import discover
from tests.helpers.coordinating import Relabelled, coordinate, of, real_grid
from tests.helpers.grids import ScriptedGrid
from tests.helpers.runs import as_bytes, configuration, prepared


class TestDiscovery:
    def test_clients_without_names_are_asked_for_them(self, tmp_path: Path) -> None:
        """Under an engine that names no nodes, clients tell their names, and the result is the same to the bit."""
        possible = prepared(tmp_path, of("fedavg"))
        expected = coordinate(possible, real_grid(possible))
        outcome = coordinate(prepared(tmp_path, of("fedavg")), Relabelled(possible, seed=4, named=False))
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)

    def test_query_carries_no_model(self, tmp_path: Path) -> None:
        """A client that is asked for its name is not sent any weights."""
        possible = prepared(tmp_path)
        grid = Relabelled(possible, seed=4, named=False)
        roster = discover(grid, possible.config)
        assert list(roster) == ["client-00", "client-01", "client-02", "client-03"]
        assert [message.metadata.message_type for message in grid.sent] == ["query"] * 4
        assert all(list(message.content) == [CONFIG] for message in grid.sent)

    def test_clients_that_do_not_tell_their_name_are_left_out(self, tmp_path: Path) -> None:
        """A node that fails at its name is no client of the run."""
        possible = prepared(tmp_path)
        inner = Relabelled(possible, seed=4, named=False)

        def answer(messages: list[Message]) -> Iterable[Message]:
            yield failure_reply(messages[0], FailureCode.CLIENT_FAILED)
            yield from inner.send_and_receive(messages[1:])

        grid = ScriptedGrid(answer, inner.nodes)
        grid.get_nodes = inner.get_nodes  # type: ignore[method-assign]
        assert len(discover(grid, possible.config)) == 3

    def test_empty_federation_is_refused(self, tmp_path: Path) -> None:
        """Without a client the run ends at once with an error that says so."""
        with pytest.raises(RunError, match="no client is there"):
            discover(ScriptedGrid(lambda messages: []), configuration())

    def test_two_clients_of_one_name_are_refused(self, tmp_path: Path) -> None:
        """Names decide order and cohorts, so they must be unique."""
        grid = ScriptedGrid(lambda messages: [], [2, 3])
        grid.get_nodes = lambda: [NodeInfo(node_id=2, name="a"), NodeInfo(node_id=3, name="a")]  # type: ignore[method-assign]
        with pytest.raises(RunError, match="same name"):
            discover(grid, configuration())
