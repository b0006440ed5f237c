"""The same apps on Flower's own simulation runtime, which spreads clients over Ray."""

from __future__ import annotations

import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.errors import RunError
from common.flower import CONFIG, NodeInfo, config_of
from server.grids import WrappingGrid

if TYPE_CHECKING:
    from simulations.cluster.connection import Cluster
    from simulations.inline import AppFactory
    from simulations.states import ClientStates


_WHICH: Final = "query.which"
"""Message by which the coordinator asks a simulated node which partition it is; no real site answers it."""
_PARTITION: Final = "partition-id"
_START_SECONDS: Final = 120.0


_made: dict[str, ClientApp] = {}
"""The app of the run that this process works for, by the run's token."""


class _MadeInActor(ClientApp):
    """A ClientApp that travels to a Ray actor as its factory and is made there: keys and generators never travel.

    It travels with every message, and is made once in a process.
    """

    def __init__(self, factory: AppFactory, token: str | None = None) -> None:
        super().__init__()
        self._factory = factory
        self._token = token or secrets.token_hex(16)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer with the app that this process made, or with what only this runtime asks for."""
        if message.metadata.message_type == _WHICH:
            told = ConfigRecord({_PARTITION: context.node_config[_PARTITION]})
            return Message(RecordDict({CONFIG: told}), reply_to=message)
        if self._token not in _made:
            _made.clear()
            _made[self._token] = self._factory()
        return _made[self._token](message, context)

    def __reduce__(self) -> tuple[type[_MadeInActor], tuple[AppFactory, str]]:
        return _MadeInActor, (self._factory, self._token)


class NamedNodes(WrappingGrid):
    """Flower's grid with its nodes named: the runtime knows them by random numbers, and each node its partition."""

    def __init__(self, inner: Grid, names: Sequence[str]) -> None:
        super().__init__(inner)
        end = time.monotonic() + _START_SECONDS
        while len(nodes := list(inner.get_node_ids())) < len(names):  # the runtime adds them while it starts us
            if time.monotonic() > end:
                raise RunError("Flower's simulation runtime does not start", hint="see its messages above")
            time.sleep(0.02)
        asked = [Message(RecordDict(), node, _WHICH) for node in nodes]
        self._nodes = []
        for reply in inner.send_and_receive(asked):
            partition = config_of(reply.content)[_PARTITION]
            self._nodes.append(NodeInfo(node_id=reply.metadata.src_node_id, name=names[int(str(partition))]))

    def get_nodes(self) -> list[NodeInfo]:
        """All clients with their names."""
        return self._nodes


def run_on_ray(
    server_app: ServerApp,
    factory: AppFactory,
    *,
    names: Sequence[str],
    workers: int,
    around: Callable[[Grid], Grid] | None = None,
    cluster: Cluster | None = None,
    states: ClientStates | None = None,
) -> None:
    """Run a ServerApp over simulated nodes on Ray: on this machine `workers` at a time, or on a cluster.

    Args:
        server_app: The coordinator.
        factory: Makes the clients' app, in each of Ray's processes.
        names: One for each node, in the order of their partitions.
        workers: How many nodes work at a time on this machine.
        around: What wraps Flower's grid.
        cluster: Where the nodes work instead, or None.
        states: Where clients' states are kept from round to round on a cluster.

    Raises:
        RunError: Ray is not installed, or the runtime failed.
    """
    try:
        import ray  # noqa: F401 - Flower's runtime needs it
    except ImportError as e:
        raise RunError("Ray is not installed", hint="pip install 'coterie[ray]', or use --engine inline") from e

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    failures: list[Exception] = []
    around = around or _bare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flower and Ray warn about themselves
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            if cluster is not None:
                _on_cluster(server_app, factory, cluster, names=names, around=around, failures=failures, states=states)
            else:
                _on_this_machine(server_app, factory, workers, names=names, around=around, failures=failures)
        except RuntimeError as e:
            if failures:
                raise failures[0] from e
            raise RunError("Flower's simulation runtime failed", hint="see its messages above") from e
    if failures:
        raise failures[0]


def _on_this_machine(
    server_app: ServerApp,
    factory: AppFactory,
    workers: int,
    *,
    names: Sequence[str],
    around: Callable[[Grid], Grid],
    failures: list[Exception],
) -> None:
    """Run it over processes of a Ray that the runtime starts and ends."""
    from flwr.simulation import run_simulation

    cores = max(1, (os.cpu_count() or 1) // workers)
    run_simulation(
        server_app=_keeping_errors(server_app, failures, lambda grid: around(NamedNodes(grid, names))),
        client_app=_MadeInActor(factory),
        num_supernodes=len(names),
        backend_config={
            "client_resources": {"num_cpus": cores, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False},
        },
    )


def _on_cluster(
    server_app: ServerApp,
    factory: AppFactory,
    cluster: Cluster,
    *,
    names: Sequence[str],
    around: Callable[[Grid], Grid],
    failures: list[Exception],
    states: ClientStates | None,
) -> None:
    """The same over the processes of a cluster that is connected."""
    from simulations.cluster.pool import ActorPool
    from simulations.cluster.runtime import ClusterGrid, places_for, run_over

    pool = ActorPool(factory, gpus=cluster.gpus, most=cluster.clients, set_up=cluster.shared)
    pool.start()
    places = places_for(pool.size)

    def placed(grid: Grid) -> Grid:
        return around(ClusterGrid(grid, names, places=places, states=states, stopped=lambda: pool.closed))

    run_over(pool, _keeping_errors(server_app, failures, placed), places=places)


def _bare(grid: Grid) -> Grid:
    return grid


def _keeping_errors(server_app: ServerApp, failures: list[Exception], around: Callable[[Grid], Grid]) -> ServerApp:
    """The app over the wrapped grid. The runtime replaces an app's exception by its own: the first is kept."""
    wrapper = ServerApp()

    @wrapper.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server_app(around(grid), context)
        except Exception as e:
            failures.append(e)
            raise

    return wrapper
