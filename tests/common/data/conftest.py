"""What the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.settings import DataSettings
from common.data import load_federation
from common.schema import Federation
from common.site import DataSource, Site

NOWHERE = Site()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds nothing, so that no test sees what this machine has fetched."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("COTERIE_DATA", str(folder))
    return folder


@pytest.fixture
def federate() -> Callable[..., Federation]:
    """Loads a federation from data settings."""

    def load(*, seed: int = 1, site: Site = NOWHERE, **settings: object) -> Federation:
        return load_federation(DataSettings.model_validate(settings), seed=seed, site=site)

    return load


@pytest.fixture
def register(tmp_path: Path) -> Callable[..., Site]:
    """A site whose data set `own` is read as the given source says, from the test's own folder."""

    def site(source: str, **options: object) -> Site:
        return Site(data={"own": DataSource.model_validate({"source": source, **options})}, folder=tmp_path)

    return site
