"""Secure aggregation under Flower's own runtime, which starts a process for every message: the simulation's model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from common.config.load import parse_config
from server.flower_cli import app
from server.store import RunFolder
from simulations.run import execute, prepare
from tests.helpers.hospitals import OPERATOR, RUN, hospital_kits
from tests.helpers.leaks import WINDOW, Plaintext
from tests.helpers.sums import listening
from tests.helpers.superlink import Runtime, flower_runtime, settings_of
from tests.simulations.test_secagg import furthest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("flower-runtime")]

SITES = ("cleveland", "hungary", "va-long-beach")
"""The fewest that a sum can have."""


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    return hospital_kits(tmp_path / "kits", SITES)


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory, kits: Path) -> Iterator[Runtime]:
    with flower_runtime(
        tmp_path_factory.mktemp("runtime"),
        server_kit=kits / "server",
        site_kits={site: kits / site for site in SITES},
        executors={},
    ) as running:
        yield running


def test_sums_open_over_processes_that_end_with_every_message(
    runtime: Runtime, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of three hospitals: a member's secrets wait for its next process, in memory; nobody else keeps them.

    The simulation's model up to rounding, which is each site's secret; and no update in anything that the
    coordinator or the SuperLink keeps.
    """
    three = RUN.replace('sites = ["cleveland", "hungary"]', f"sites = {list(SITES)}".replace("'", '"'))
    (tmp_path / "run.toml").write_text(f"{three}\n[privacy]\nsecure_aggregation = true\n")
    words = ["bundle", "--run", tmp_path / "run.toml", "--kit", kits / OPERATOR, "--out", tmp_path / "app"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output

    status, output = runtime.run(tmp_path / "app")
    assert status == "finished:completed", output
    (path,) = (kits / "server" / "state" / "runs").iterdir()
    rows = RunFolder.open(path).rounds()
    assert [row["survivors"] for row in rows] == [list(SITES)] * 2
    assert {row["aggregation"]["epoch"] for row in rows} == {1}

    config = parse_config(settings_of(tmp_path / "app")["run"])
    with listening(monkeypatch) as learnt:
        simulated = execute(prepare(config, folder=tmp_path / "simulated"))
    assert furthest(load_file(path / "model.safetensors"), dict(simulated.arrays)) <= 1e-6
    plaintext = Plaintext(learnt.forms)
    assert not [blob for blob in runtime.stored() if len(blob) >= WINDOW and plaintext.found_in(blob)]
    kept = [file for file in (kits / "server").rglob("*") if file.is_file() and file.stat().st_size >= WINDOW]
    assert not [file for file in kept if plaintext.found_in(file.read_bytes())]
