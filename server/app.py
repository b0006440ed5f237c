"""The Flower ServerApp: the same coordinator under any of Flower's engines."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.flower import prepare_process
from server.coordinator import Coordinator, Job, Outcome


def make_server_app(job: Job, on_outcome: Callable[[Outcome], None]) -> ServerApp:
    """A ServerApp that coordinates one job and hands over its outcome."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        prepare_process()
        on_outcome(Coordinator(job).run(grid))

    return app
