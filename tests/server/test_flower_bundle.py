"""The bundle of a run for Flower's own runtime: thin, under a name of its own, signed by an operator."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.config.load import parse_config
from common.crypto import PartyKeys, authorize, read_authorization
from common.errors import KitError, RefusedError, RunError
from common.flower_runtime import KIT_VARIABLE, kit_folder, read_settings
from server.flower_bundle import write_bundle
from tests.helpers.runs import configuration
from tests.helpers.superlink import settings_of

RUN_ID = "0123456789abcdef" * 2
OURS = {"server", "client", "common", "simulations"}
_CONFIG = configuration(name="ward", rounds=2)


@pytest.fixture
def operator() -> PartyKeys:
    return PartyKeys.generate("ada", "operator")


@pytest.fixture
def bundle(tmp_path: Path, operator: PartyKeys) -> Path:
    digest = _CONFIG.digest()
    signed = authorize(operator, federation="clinics", run_id=RUN_ID, config_digest=digest)
    write_bundle(tmp_path / "bundle", _CONFIG, federation="clinics", authorization=signed)
    return tmp_path / "bundle"


class TestBundle:
    @pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
    def test_flower_packs_every_file_of_it(self, bundle: Path) -> None:
        """Flower's own packer takes it as it is, within its limits on suffixes and size."""
        packed = build_fab_from_disk(bundle)
        assert len(packed) < 10_000_000
        inside = {name for name in zipfile.ZipFile(io.BytesIO(packed)).namelist() if not name.startswith(".info")}
        assert inside == {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}

    def test_shadows_no_package_of_ours(self, bundle: Path) -> None:
        """It is put first on the module path: a package called `server` in it would take the place of ours."""
        modules = {path.stem for path in bundle.iterdir() if path.is_dir() or path.suffix == ".py"}
        assert modules == {"coterie_flower"}
        assert not modules & (OURS | sys.stdlib_module_names)

    def test_carries_the_run_and_an_operators_signature(self, bundle: Path, operator: PartyKeys) -> None:
        """Whoever pins the operator can tell that exactly this configuration was ordered."""
        text, signed = read_settings(settings_of(bundle))
        run = read_authorization(signed, federation="clinics", operators={"ada": operator.record})
        assert parse_config(text) == _CONFIG
        assert (run.run_id, run.config_digest) == (RUN_ID, _CONFIG.digest())

    def test_says_nothing_of_any_kit(self, bundle: Path) -> None:
        """No path and no key travels: each machine knows its own kit."""
        assert set(settings_of(bundle)) == {"run", "authorization"}

    def test_overwrites_nothing(self, bundle: Path) -> None:
        """A folder that holds something is refused."""
        with pytest.raises(RunError, match="not empty"):
            write_bundle(bundle, _CONFIG, federation="clinics", authorization="")

    @pytest.mark.parametrize("module", ["server_app", "client_app"])
    def test_its_apps_load_without_a_kit(self, bundle: Path, module: str) -> None:
        """Flower loads an app before it knows what it will be asked; nothing is read until then."""
        code = f"import sys; sys.path.insert(0, {str(bundle)!r}); from coterie_flower.{module} import app; print(app)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={})
        assert "App object" in done.stdout, done.stderr


class TestKit:
    def test_node_comes_before_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One machine can serve several sites: each node names its own kit."""
        monkeypatch.setenv(KIT_VARIABLE, "/kits/a")
        assert kit_folder({"kit": "/kits/b"}) == Path("/kits/b")
        assert kit_folder({}) == Path("/kits/a")

    @pytest.mark.parametrize("node", [{}, {"kit": 3}, {"kit": ""}])
    def test_without_a_kit_the_error_says_how_to_name_one(
        self, node: dict[str, object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message names the variable and the option."""
        monkeypatch.delenv(KIT_VARIABLE, raising=False)
        with pytest.raises(KitError) as caught:
            kit_folder(node)
        assert KIT_VARIABLE in caught.value.hint
        assert "--node-config" in caught.value.hint

    @pytest.mark.parametrize("settings", [{}, {"run": "{}"}, {"run": 1, "authorization": "x"}])
    def test_settings_of_another_bundle_are_refused(self, settings: dict[str, object]) -> None:
        """A bundle that Coterie did not write starts nothing."""
        with pytest.raises(RefusedError, match="bundle"):
            read_settings(settings)
