"""What the server's tests start from."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from common.flower import prepare_process


@pytest.fixture(autouse=True, scope="module")
def _flower() -> Iterator[None]:
    """Let this process build messages. QFedAvg and Bulyan collect garbage once a reply: keep what is imported out."""
    prepare_process()
    gc.freeze()
    yield
    gc.unfreeze()
