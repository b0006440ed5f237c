"""The same apps on Flower's own simulation runtime, which spreads clients over Ray."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from common.errors import RunError

if TYPE_CHECKING:
    from simulations.inline import AppFactory


class _MadeInActor(ClientApp):
    """A ClientApp that travels to a Ray actor as its factory and is made there: keys and generators never travel."""

    def __init__(self, factory: AppFactory) -> None:
        super().__init__()
        self._factory = factory
        self._made: ClientApp | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer with the app that this process made."""
        if self._made is None:
            self._made = self._factory()
        return self._made(message, context)

    def __reduce__(self) -> tuple[type[_MadeInActor], tuple[AppFactory]]:
        return _MadeInActor, (self._factory,)


def run_on_ray(server_app: ServerApp, factory: AppFactory, *, clients: int, workers: int) -> None:
    """Run a ServerApp over `clients` simulated nodes on Ray, `workers` at a time.

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
    app = _keeping_errors(server_app, failures)
    cores = max(1, (os.cpu_count() or 1) // workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flower and Ray warn about themselves
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            run_simulation(
                server_app=app,
                client_app=_MadeInActor(factory),
                num_supernodes=clients,
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


def _keeping_errors(server_app: ServerApp, failures: list[Exception]) -> ServerApp:
    """The runtime replaces an app's exception by its own; keep the first one to raise it again."""
    from flwr.serverapp import Grid

    wrapper = ServerApp()

    @wrapper.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server_app(grid, context)
        except Exception as e:
            failures.append(e)
            raise

    return wrapper
