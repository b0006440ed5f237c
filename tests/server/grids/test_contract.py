"""What every grid promises: Flower's strategies run on it unmodified, whatever it is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy

from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, WEIGHT, arrays_of, failure_of, metrics_of, to_record
from common.models.weights import ModelWeights
from server.grids import CheckedGrid, FoldingGrid, SpoolingGrid
from server.roster import CohortView
from simulations.engines import inline_grid
from simulations.inline import app_factory
from simulations.run import Prepared
from simulations.sealing import Sealing
from tests.helpers.runs import as_bytes, configuration, prepared

BASES = {"in process": 1, "two workers": 2}
Wrap = Callable[[Grid, Prepared], Grid]
SEALED = "sealed"
"""Wrappers with this in their name stand over clients that take sealed messages only."""


def checked(grid: Grid, run: Prepared) -> Grid:
    template = ModelWeights(run.model).copy()
    return CheckedGrid(
        grid,
        template=template,
        equal_weights=False,
        metrics=["train_loss"],
        largest=2.0**32,
        on_reply=lambda message, failure: None,
    )


WRAPPERS: dict[str, Wrap] = {
    "bare": lambda grid, run: grid,
    "checked": checked,
    "cohort": lambda grid, run: CohortView(grid, list(grid.get_node_ids())),
    "all individual": lambda grid, run: CohortView(checked(grid, run), list(grid.get_node_ids())),
    "sealed": lambda grid, run: grid,
    "sealed, checked": checked,
    "spooled": lambda grid, run: SpoolingGrid(checked(grid, run), in_memory=0),
}
FOLDED: dict[str, Wrap] = {
    "folded": lambda grid, run: FoldingGrid(grid),
    "folded, sealed": lambda grid, run: FoldingGrid(checked(grid, run), in_memory=0),
    "folded, checked": lambda grid, run: FoldingGrid(WRAPPERS["all individual"](grid, run)),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@contextmanager
def grid_over(base: str, wrapper: str, folder: Path, *, data: str = "blobs", trouble: str = "none") -> Iterator[Grid]:
    """A grid with four clients; with `one-in-trouble` the second one may fail."""
    run = prepared(folder, data={"name": data}, model={"options": {"trouble": trouble}})
    names = [client.name for client in run.federation.clients]
    sealing = Sealing.for_clients(names) if SEALED in wrapper else None
    keys = sealing.clients if sealing else None
    with inline_grid(run, lambda sites: app_factory(sites, keys), workers=BASES[base]) as grid:
        yield (WRAPPERS | FOLDED)[wrapper](sealing.around(grid, run.config) if sealing else grid, run)


def request_of(folder: Path, *, data: str = "blobs", trouble: str = "none") -> tuple[ArrayRecord, ConfigRecord]:
    config = configuration(data={"name": data}, model={"options": {"trouble": trouble}})
    arrays = ModelWeights(prepared(folder, config).model).copy()
    return to_record(arrays), ConfigRecord({"run": config.canonical_json()})


def ask_all(grid: Grid, folder: Path, **where: str) -> list[Message]:
    arrays, config = request_of(folder, **where)
    config["server-round"] = 1
    content = RecordDict({ARRAYS: arrays, CONFIG: config})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def train(strategy: Strategy, grid: Grid, folder: Path) -> dict[str, tuple[str, bytes]]:
    """Two rounds of Flower's own loop."""
    arrays, config = request_of(folder)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2, train_config=config, timeout=600)
    return as_bytes({name: array.numpy() for name, array in result.arrays.items()})


class Sorted(FedAvg):
    """FedAvg that aggregates in the order of node ids; Flower's own asks in a random one."""

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        return super().aggregate_train(server_round, sorted(replies, key=lambda r: r.metadata.src_node_id))


@pytest.mark.parametrize("wrapper", WRAPPERS | FOLDED)
class TestEveryGrid:
    def test_takes_flowers_keyword_names(self, wrapper: str, tmp_path: Path) -> None:
        """Strategies call `send_and_receive(messages=..., timeout=...)`: the names are part of the contract."""
        with grid_over("in process", wrapper, tmp_path) as grid:
            signature = inspect.signature(grid.send_and_receive)
            assert list(signature.parameters) == ["messages", "timeout"]
            assert isinstance(grid, Grid)
            assert list(grid.send_and_receive(messages=[], timeout=1.0)) == []

    def test_names_its_clients(self, wrapper: str, tmp_path: Path) -> None:
        """A site has a name; node ids are unique and belong to the same clients."""
        with grid_over("in process", wrapper, tmp_path) as grid:
            nodes = list(grid.get_nodes())
            assert [node.name for node in nodes] == ["client-00", "client-01", "client-02", "client-03"]
            assert [node.node_id for node in nodes] == list(grid.get_node_ids())
            assert len({node.node_id for node in nodes}) == 4

    def test_passes_failures_with_their_reason(self, wrapper: str, base: str, tmp_path: Path) -> None:
        """A client that raises is an error reply with its code; its exception's text stays where it was."""
        with grid_over(base, wrapper, tmp_path, data="one-in-trouble", trouble="raise") as grid:
            messages = ask_all(grid, tmp_path, data="one-in-trouble", trouble="raise")
            replies = list(grid.send_and_receive(messages=messages, timeout=None))
        (failed,) = [reply for reply in replies if reply.has_error()]
        assert failed.metadata.src_node_id == messages[1].metadata.dst_node_id
        assert failure_of(failed) is FailureCode.CLIENT_FAILED
        assert "17" not in failed.error.reason

    def test_sent_messages_can_be_pulled_later(self, wrapper: str, tmp_path: Path) -> None:
        """Flower's other way, `push_messages` and `pull_messages`, reaches the same clients; a reply is taken once."""
        with grid_over("in process", wrapper, tmp_path) as grid:
            ids = list(grid.push_messages(ask_all(grid, tmp_path)))
            replies = list(grid.pull_messages(ids))
            assert [reply.metadata.reply_to_message_id for reply in replies] == ids
            assert all(reply.has_content() for reply in replies)
            assert list(grid.pull_messages(ids)) == []


@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestGridsThatShowEveryReply:
    def test_parameters_are_exact(self, wrapper: str, base: str, tmp_path: Path) -> None:
        """What a client trained arrives bit for bit, in the model's order, with its number of examples."""
        with grid_over(base, wrapper, tmp_path) as grid:
            replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages=ask_all(grid, tmp_path))}
        with grid_over("in process", "bare", tmp_path) as grid:
            expected = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages=ask_all(grid, tmp_path))}
        assert replies.keys() == expected.keys()
        for node, reply in replies.items():
            assert list(arrays_of(reply.content)) == ["layer.weight", "layer.bias"]
            assert as_bytes(arrays_of(reply.content)) == as_bytes(arrays_of(expected[node].content))
            assert dict(metrics_of(reply.content)) == dict(metrics_of(expected[node].content))
        assert sorted(metrics_of(r.content)[WEIGHT] for r in replies.values()) == [12, 15, 18, 21]

    @pytest.mark.parametrize("strategy", [Sorted, FedMedian])
    def test_strategies_run_unmodified(self, strategy: type[FedAvg], wrapper: str, base: str, tmp_path: Path) -> None:
        """Flower's own loop trains over every grid to the same bytes as over the plain one."""
        with grid_over(base, wrapper, tmp_path) as grid:
            result = train(strategy(fraction_evaluate=0.0), grid, tmp_path)
        with grid_over("in process", "bare", tmp_path) as grid:
            assert result == train(strategy(fraction_evaluate=0.0), grid, tmp_path)

    def test_krum_finds_its_client(self, wrapper: str, base: str, tmp_path: Path) -> None:
        """A strategy that needs each reply gets each: Krum's result is one client's update."""
        with grid_over(base, wrapper, tmp_path) as grid:
            arrays, config = request_of(tmp_path)
            krum = Krum(num_malicious_nodes=0, fraction_evaluate=0.0)
            result = krum.start(grid=grid, initial_arrays=arrays, num_rounds=1, train_config=config).arrays
            replies = [arrays_of(r.content) for r in grid.send_and_receive(messages=ask_all(grid, tmp_path))]
        assert as_bytes({name: array.numpy() for name, array in result.items()}) in [as_bytes(r) for r in replies]


@pytest.mark.parametrize("wrapper", FOLDED)
class TestGridsThatFold:
    @pytest.mark.parametrize("kind", [FedAvg, FedAdam])
    def test_strategies_of_the_mean_run_unmodified(
        self, kind: type[FedAvg], wrapper: str, base: str, tmp_path: Path
    ) -> None:
        """FedAvg and FedAdam reach what they reach over all replies, up to float32 rounding."""
        results = []
        for where, name in ((base, wrapper), ("in process", "bare")):
            with grid_over(where, name, tmp_path) as grid:
                arrays, config = request_of(tmp_path)
                result = kind(fraction_evaluate=0.0).start(
                    grid=grid, initial_arrays=arrays, num_rounds=2, train_config=config
                )
                results.append(result.arrays)
        for name in results[0]:
            np.testing.assert_allclose(results[0][name].numpy(), results[1][name].numpy(), rtol=1e-4, atol=1e-6)

    def test_all_failed_leaves_only_failures(self, wrapper: str, tmp_path: Path) -> None:
        """Where nobody has an update, the strategy sees failures and nothing else."""
        with grid_over("in process", wrapper, tmp_path) as grid:
            messages = ask_all(grid, tmp_path)
            del messages[0].content[CONFIG]  # all carry the same content
            replies = list(grid.send_and_receive(messages=messages))
        assert [failure_of(reply) for reply in replies] == [FailureCode.INVALID_REQUEST] * 4


def test_messages_of_one_call_may_carry_different_models(base: str, tmp_path: Path) -> None:
    """Every client starts from the arrays in its own message, also where they differ from client to client."""
    with grid_over(base, "bare", tmp_path) as grid:
        arrays, config = request_of(tmp_path)
        config["server-round"] = 1
        start = {name: array.numpy() for name, array in arrays.items()}
        nodes: Sequence[int] = list(grid.get_node_ids())
        models = {node: {name: v + np.float32(100 * node) for name, v in start.items()} for node in nodes}
        replies = list(
            grid.send_and_receive(
                messages=[
                    Message(RecordDict({ARRAYS: to_record(models[node]), CONFIG: config}), node, "train")
                    for node in nodes
                ],
                timeout=None,
            )
        )
    assert [failure_of(reply) for reply in replies] == [None] * 4
    for reply in replies:
        trained = arrays_of(reply.content)["layer.weight"]
        assert np.abs(trained - models[reply.metadata.src_node_id]["layer.weight"]).max() < 20
