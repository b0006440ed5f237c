"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _plain_log() -> Iterator[None]:
    """A command line directs the process's log; the next test starts without that."""
    yield
    structlog.reset_defaults()
