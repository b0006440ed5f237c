"""A site's own `flwr-clientapp`: under Flower's own runtime it runs the Coterie that the site installed.

Flower's own program unpacks the bundle that came with a run, puts it first on the module path and executes its code.
This one is that program without these steps: the bundle is neither unpacked nor imported, no dependency is installed,
and the one app there is comes from here. `coterie flower executor` writes the script that starts it; flower-superexec
finds it first on its PATH. It replaces names of Flower that are not public, and flwr is pinned because of it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from flwr.clientapp import ClientApp
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp as runtime

from client.flower_app import app
from common.errors import RefusedError


def main() -> None:
    """Answer one message, as `flwr-clientapp` does."""
    steps = {
        "install_from_fab": _unpack_nothing,
        "install_app_dependencies": _install_nothing,
        "get_load_client_app_fn": _load_installed,
    }
    for name, step in steps.items():
        getattr(runtime, name)  # a Flower that has no such step has another one, which would run
        setattr(runtime, name, step)
    flwr_clientapp()


def _unpack_nothing(*_: Any, **__: Any) -> None:
    """In place of unpacking the bundle into a folder of this machine."""


def _install_nothing(*_: Any, **__: Any) -> NoReturn:
    """In place of installing what the bundle says that it needs."""
    raise RefusedError(
        "this executor installs nothing that a run brings",
        hint="start flower-superexec without --allow-runtime-dependency-installation",
    )


def _load_installed(*_: Any, **__: Any) -> Any:
    """In place of importing the app that the bundle names."""

    def load(*_: Any) -> ClientApp:
        return app

    return load


if __name__ == "__main__":
    main()
