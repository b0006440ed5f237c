"""A coordinator over grids of one's own, and runs that stop where a test says."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from common.config import RunConfig
from common.flower import NodeInfo, client_context, prepare_process
from server.coordinator import Coordinator, Job, Outcome, RoundRecord
from server.store import RunFolder
from simulations.inline import InlineGrid, InProcess, app_factory
from simulations.run import Prepared
from tests.helpers.grids import ScriptedGrid
from tests.helpers.runs import STRATEGIES, Log, configuration

prepare_process()


class StoppedError(Exception):
    """Stands for whatever ends a process between two instructions."""


class Stopping(Log):
    """Ends the run at one place of one round."""

    def __init__(self, place: str, server_round: int) -> None:
        super().__init__()
        self._place, self._round, self._now = place, server_round, 0

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        self._now = server_round
        self._stop("started")

    def reply_received(self, client: str, failure: Any) -> None:
        super().reply_received(client, failure)
        self._stop("reply")

    def round_finished(self, record: RoundRecord) -> None:
        super().round_finished(record)
        self._stop("recorded")

    def _stop(self, place: str) -> None:
        if (place, self._now) == (self._place, self._round):
            raise StoppedError


def of(name: str, **changes: Any) -> RunConfig:
    """Seven clients under one strategy; a cohort drawn anew each round where the strategy allows a smaller one."""
    size = 7 if name == "bulyan" else 6
    return configuration(
        rounds=4, strategy={"name": name, **STRATEGIES[name]}, data={"clients": 7}, cohort={"size": size}
    ).model_copy(update=changes)


def coordinate(run: Prepared, grid: Grid, *, observer: Any = None, folder: RunFolder | None = None) -> Outcome:
    """The coordinator over a grid of one's own."""
    job = Job(
        config=run.config,
        model=run.model,
        held_out=run.federation.test,
        plan=run.plan,
        folder=folder,
        observer=observer or Log(),
    )
    return Coordinator(job).run(grid)


def real_grid(run: Prepared) -> InlineGrid:
    return InlineGrid(InProcess(app_factory(run.sites)), [client.name for client in run.federation.clients])


class Relabelled(ScriptedGrid):
    """The same clients under random node ids, listed and answering in random order, with or without their names."""

    def __init__(self, run: Prepared, *, seed: int, named: bool = True) -> None:
        generator = random.Random(seed)
        clients = [client.name for client in run.federation.clients]
        app, self._named = app_factory(run.sites)(), named
        nodes = generator.sample(range(2, 10**9), len(clients))
        self.partitions = dict(zip(nodes, range(len(clients)), strict=True))
        self.names = dict(zip(nodes, clients, strict=True))
        generator.shuffle(nodes)

        def answer(messages: list[Message]) -> Iterable[Message]:
            generator.shuffle(messages)
            for message in messages:
                node = message.metadata.dst_node_id
                yield app(message, client_context(node_id=node, partition=self.partitions[node]))

        super().__init__(answer, nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names[node] if self._named else "") for node in self.nodes]
