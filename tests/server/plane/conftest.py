"""Kits made once, and planes around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.plane import Plane, make_kits, running_plane


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's kits; copy them to change them."""
    return make_kits(tmp_path_factory.mktemp("kits") / "kits")


@pytest.fixture
def start(kits: Path, tmp_path: Path) -> Iterator[Callable[..., Plane]]:
    """Starts planes, which end with the test."""
    with ExitStack() as stack:

        def start(folder: str = "plane", **changes: Any) -> Plane:
            return stack.enter_context(running_plane(changes.pop("kits", kits), tmp_path / folder, **changes))

        yield start


@pytest.fixture
def plane(start: Callable[..., Plane]) -> Plane:
    """A plane with the defaults."""
    return start()
