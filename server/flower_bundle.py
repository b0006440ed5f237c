"""Writes the bundle with which `flwr run` starts a run under Flower's own runtime.

A bundle carries only py, toml, md, yaml and json files and is put first on the module path, so that a package in it
would shadow an installed one of the same name. This one holds three short files under a name of its own; they import
what is installed at each party. The run's configuration and its operator's signature travel in the bundle's settings.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import tomli_w

from common.config import RunConfig
from common.disk import atomic_file, disk_errors
from common.errors import RunError
from common.flower_runtime import AUTHORIZATION_KEY, RUN_KEY

PACKAGE: Final = "coterie_flower"
"""The bundle's only package; nothing that is installed is called so."""

_SERVER_APP: Final = '''"""The coordinator of this run: what is installed here, not what came with the bundle."""

from server.flower_app import app

__all__ = ["app"]
'''
_CLIENT_APP: Final = '''"""The site: what is installed here, not what came with the bundle."""

from client.flower_app import app

__all__ = ["app"]
'''
_README: Final = """# {name}

A run of the federation `{federation}` for Flower's own runtime, written by `coterie flower bundle`.
It holds settings and no code of its own: Coterie must be installed at every party, and each party's kit lies on its own
machine. `flwr run` starts it; docs/flower-runtime.md of Coterie says how to do so safely.
"""
_LICENSE: Final = "SPDX-License-Identifier: Apache-2.0\n\nhttp://www.apache.org/licenses/LICENSE-2.0\n"


def write_bundle(folder: Path, config: RunConfig, *, federation: str, authorization: str) -> None:
    """Write a bundle for one run into a new or empty folder.

    Args:
        folder: Where to.
        config: The run.
        federation: Whose run it is.
        authorization: What an operator signed for it.

    Raises:
        RunError: The folder is not empty, or cannot be written.
    """
    files = {
        f"{PACKAGE}/__init__.py": '"""A run of Coterie under Flower\'s own runtime."""\n',
        f"{PACKAGE}/server_app.py": _SERVER_APP,
        f"{PACKAGE}/client_app.py": _CLIENT_APP,
        "README.md": _README.format(name=config.name, federation=federation),
        "LICENSE": _LICENSE,
        "pyproject.toml": tomli_w.dumps(_project(config, authorization)),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunError(f"{folder} is not empty", hint="name a new folder with --out")
        (folder / PACKAGE).mkdir()
        for name, text in files.items():  # the project file last: without it the folder is no bundle
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _project(config: RunConfig, authorization: str) -> dict[str, Any]:
    """The bundle's pyproject.toml, as Flower's format 1 wants it."""
    flwr = version("flwr")
    return {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": PACKAGE.replace("_", "-"),
            "version": version("coterie"),
            "description": f"The run {config.name} of Coterie",
            "license": {"file": "LICENSE"},
            "dependencies": [f"flwr>={flwr}"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "coterie",
                    "fab-format-version": 1,
                    "flwr-version-target": flwr,
                    "components": {
                        "serverapp": f"{PACKAGE}.server_app:app",
                        "clientapp": f"{PACKAGE}.client_app:app",
                    },
                    "config": {RUN_KEY: config.canonical_json(), AUTHORIZATION_KEY: authorization},
                }
            }
        },
    }
