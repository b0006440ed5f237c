"""A site's own executor: nothing of a bundle is unpacked, installed or imported."""

from __future__ import annotations

import pytest
from flwr.supernode.runtime import run_clientapp as runtime

from client import flower_executor
from client.flower_app import app
from common.errors import RefusedError

STEPS = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own steps are back after each test. Fails where this version of Flower has other ones."""
    for name in STEPS:
        monkeypatch.setattr(runtime, name, getattr(runtime, name))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor, up to the moment at which Flower's program begins."""
    began: list[bool] = []
    monkeypatch.setattr(flower_executor, "flwr_clientapp", lambda: began.append(True))
    flower_executor.main()
    assert began


@pytest.mark.usefixtures("prepared")
class TestExecutor:
    def test_whatever_a_bundle_names_the_installed_app_answers(self) -> None:
        """Id, version and hash of a bundle choose nothing."""
        load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
        assert load("mallory/app", "1.0.0", "00" * 32) is app

    def test_a_bundle_is_not_unpacked(self) -> None:
        """Not even looked at: these bytes are no bundle."""
        assert runtime.install_from_fab(b"no bundle", skip_prompt=True) is None

    def test_nothing_is_installed(self) -> None:
        """Where Flower is told to install what a run needs, the run fails instead."""
        with pytest.raises(RefusedError, match="installs nothing"):
            runtime.install_app_dependencies("folder")


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that Flower no longer has was replaced by one that would run: nothing starts then."""
    began: list[bool] = []
    monkeypatch.setattr(flower_executor, "flwr_clientapp", lambda: began.append(True))
    monkeypatch.delattr(runtime, "install_from_fab")
    with pytest.raises(AttributeError):
        flower_executor.main()
    assert not began
