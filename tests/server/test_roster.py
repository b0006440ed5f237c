"""Who takes part: clients by name, whatever their node ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
from flwr.app import Message

from common.errors import DataError, FailureCode, RunError
from common.flower import CONFIG, SCHEMA, NodeInfo, config_of, failure_reply
from common.names import NumberedNames
from common.schema import DataSchema
from server.grids.base import FIRST_NODE
from server.roster import CohortView, ask_schema, discover, request_record
from simulations.inline import Engine, InlineGrid
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


class TestRoster:
    """Names and node ids of all clients, however many."""

    def test_it_is_a_mapping(self) -> None:
        """As a dict sorted by name is, whatever the order of nodes."""
        nodes = [NodeInfo(node_id=9, name="b"), NodeInfo(node_id=4, name="a"), NodeInfo(node_id=5, name="c")]
        grid = ScriptedGrid(lambda messages: [])
        grid.get_nodes = lambda: nodes  # type: ignore[method-assign]
        roster = discover(grid, configuration())
        assert roster == {"a": 4, "b": 9, "c": 5}
        assert (list(roster), len(roster), "b" in roster, "d" in roster) == (["a", "b", "c"], 3, True, False)
        assert (roster.get("d"), list(roster.values()), dict(roster.items())) == (None, [4, 9, 5], dict(roster))
        with pytest.raises(KeyError):
            roster["d"]

    def test_ten_million_clients_are_not_looked_at(self) -> None:
        """A grid that lists them by name in order is believed."""
        grid = InlineGrid(cast("Engine", None), NumberedNames(10_000_000))
        roster = discover(grid, configuration())
        assert (len(roster), roster["client-1234567"]) == (10_000_000, 1_234_567 + FIRST_NODE)
        assert len(roster.names) == 10_000_000
        assert [node.name for node in CohortView(grid, [9, 4]).get_nodes()] == ["client-0000002", "client-0000007"]


class TestSchema:
    """What sites say of a data set that the coordinator does not know."""

    def test_is_what_all_of_them_say(self, tmp_path: Path) -> None:
        """Every client is asked once, without a model."""
        possible = prepared(tmp_path)
        grid = Relabelled(possible, seed=4)
        assert ask_schema(grid, possible.config) == possible.federation.schema
        assert [message.metadata.message_type for message in grid.sent] == ["query"] * 4

    @pytest.mark.parametrize(
        "said", ["{}", DataSchema(kind="tabular", input_shape=(9,), num_classes=2).to_text(), None]
    )
    def test_one_site_that_says_otherwise_ends_the_run(self, tmp_path: Path, said: str | None) -> None:
        """Whether it describes other data, cannot be read, or does not answer."""
        possible = prepared(tmp_path)
        inner = Relabelled(possible, seed=4)

        def answer(messages: list[Message]) -> Iterable[Message]:
            if said is None:
                yield failure_reply(messages[0], FailureCode.POLICY_REFUSED)
                messages = messages[1:]
            for place, reply in enumerate(inner.send_and_receive(messages)):
                if said is not None and place == 2:
                    config_of(reply.content)[SCHEMA] = said
                yield reply

        grid = ScriptedGrid(answer, inner.nodes)
        grid.get_nodes = inner.get_nodes  # type: ignore[method-assign]
        with pytest.raises(DataError, match="blobs"):
            ask_schema(grid, possible.config)


class TestRequests:
    """What every request says of its run."""

    def test_a_simulation_says_nothing_of_who_wants_it(self) -> None:
        """Nobody signed it."""
        assert list(request_record(configuration(), cohort=["a"])) == ["run"]

    def test_a_submitted_run_says_by_whose_order_and_with_whom(self) -> None:
        """A site's policy reads these."""
        record = request_record(configuration(), run_id="ab" * 16, authorization="signed", cohort=["a", "b"])
        assert (record["run-id"], record["authorization"], record["cohort"]) == ("ab" * 16, "signed", '["a", "b"]')

    def test_a_cohort_that_is_not_told_is_not_there(self) -> None:
        """Under client-level privacy."""
        assert "cohort" not in request_record(configuration(), run_id="ab" * 16, authorization="signed")
