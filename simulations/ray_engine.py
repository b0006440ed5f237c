"""The same apps on Flower's own simulation runtime, which spreads clients over Ray."""

from __future__ import annotations

import logging
import os
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
    from simulations.inline import AppFactory


_WHICH: Final = "query.which"
"""Message by which the coordinator asks a simulated node which partition it is; no real site answers it."""
_PARTITION: Final = "partition-id"
_START_SECONDS: Final = 120.0


class _MadeInActor(ClientApp):
    """A ClientApp that travels to a Ray actor as its factory and is made there: keys and generators never travel."""

    def __init__(self, factory: AppFactory) -> None:
        super().__init__()
        self._factory = factory
        self._made: ClientApp | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer with the app that this process made, or with what only this runtime asks for."""
        if message.metadata.message_type == _WHICH:
            told = ConfigRecord({_PARTITION: context.node_config[_PARTITION]})
            return Message(RecordDict({CONFIG: told}), reply_to=message)
        if self._made is None:
            self._made = self._factory()
        return self._made(message, context)

    def __reduce__(self) -> tuple[type[_MadeInActor], tuple[AppFactory]]:
        return _MadeInActor, (self._factory,)


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
) -> None:
    """Run a ServerApp over simulated nodes on Ray, `workers` at a time.

    Args:
        server_app: The coordinator.
        factory: Makes the clients' app, in each of Ray's processes.
        names: One for each node, in the order of their partitions.
        workers: How many nodes work at a time.
        around: What wraps Flower's grid.

    Raises:
        RunError: Ray is not installed, or the runtime failed.
    """
    try:
        import ray  # noqa: F401 - Flower's runtime needs it
    except ImportError as e:
        raise RunError("Ray is not installed", hint="pip install 'coterie[ray]', or use --engine inline") from e
    from flwr.simulation import run_simulation

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    failures: list[Exception] = []
    app = _keeping_errors(server_app, failures, lambda grid: (around or _bare)(NamedNodes(grid, names)))
    cores = max(1, (os.cpu_count() or 1) // workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flower and Ray warn about themselves
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            run_simulation(
                server_app=app,
                client_app=_MadeInActor(factory),
                num_supernodes=len(names),
                backend_config={
                    "client_resources": {"num_cpus": cores, "num_gpus": 0.0},
                    "init_args": {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False},
                },
            )
        except RuntimeError as e:
            if failures:
                raise failures[0] from e
            raise RunError("Flower's simulation runtime failed", hint="see its messages above") from e
    if failures:
        raise failures[0]


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
