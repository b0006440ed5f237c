"""Sealing and compression around whole runs: the first changes no bit, the second the same ones on every engine."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Message, RecordDict

from common.errors import FailureCode
from common.flower import CONFIG, failure_of
from server.roster import request_record
from simulations.engines import inline_grid
from simulations.inline import app_factory
from simulations.run import execute, prepare
from simulations.sealing import Sealing
from tests.helpers.processes import coterie, members, started, wait_until
from tests.helpers.runs import SITE, Log, as_bytes, configuration, prepared, private, tree

NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def trained(folder: Path, *, workers: int = 1, sealed: bool = False, **changes: Any) -> dict[str, tuple[str, bytes]]:
    """The model that a run ends with."""
    folder.mkdir()
    run = prepared(folder, configuration(**changes))
    return as_bytes(dict(execute(run, workers=workers, sealed=sealed).arrays))


class TestSealedRuns:
    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
    def test_end_with_the_same_bytes(self, tmp_path: Path, workers: int, strategy: str) -> None:
        """A sealed run's model is that of an open one, for strategies of the mean and of single replies."""
        changes = {"strategy": {"name": strategy}}
        expected = trained(tmp_path / "open", **changes)
        assert trained(tmp_path / "sealed", workers=workers, sealed=True, **changes) == expected

    @pytest.mark.parametrize("unit", ["example", "client"])
    def test_with_privacy_too(self, tmp_path: Path, unit: str) -> None:
        """Noise, ledgers and clipping see the same messages: with fixed noise the models are the same."""
        changes = {} if unit == "example" else {"privacy": {"unit": "client", "noise_multiplier": 1.0}}
        models = []
        for sealed in (False, True):
            folder = tmp_path / str(sealed)
            folder.mkdir()
            run = prepare(private(**changes), folder=folder, site_file=SITE, insecure_seed=3)
            models.append(as_bytes(dict(execute(run, sealed=sealed).arrays)))
        assert models[0] == models[1]

    def test_failures_keep_their_reasons(self, tmp_path: Path) -> None:
        """A client that fails in a sealed run fails with the same code, and the others go on."""
        run = prepared(tmp_path, data={"name": "one-in-trouble"}, model={"options": {"trouble": "raise"}})
        log = Log()
        execute(run, sealed=True, observer=log)
        assert dict(log.fates)["client-01"] is FailureCode.CLIENT_FAILED
        assert dict(log.fates)["client-00"] is None

    def test_clients_of_a_sealed_run_take_nothing_in_clear(self, tmp_path: Path) -> None:
        """An open message to a sealed client is refused, whatever its kind."""
        run = prepared(tmp_path)
        sealing = Sealing.for_clients([client.name for client in run.federation.clients])
        content = RecordDict({CONFIG: request_record(run.config)})
        with inline_grid(run, lambda sites: app_factory(sites, sealing.clients), workers=1) as grid:
            asked = [Message(content, node, kind) for node in grid.get_node_ids() for kind in ("train", "query")]
            assert {failure_of(reply) for reply in grid.send_and_receive(asked)} == {FailureCode.INVALID_REQUEST}

    def test_the_coordinators_keys_stay_in_their_process(self) -> None:
        """Worker processes get the sites' keys and the coordinator's public record, not its secrets."""
        sealing = Sealing.for_clients(["a", "b"])
        sent = pickle.dumps(sealing.clients)
        for name, seed in sealing.coordinator._seeds.items():
            assert seed not in sent, name
        assert all(keys._seeds["ed25519"] in sent for keys in sealing.clients.sites)


@pytest.mark.parametrize("codec", ["bf16", "int8", "top-k"])
def test_compression_gives_the_same_model_on_every_engine(tmp_path: Path, codec: str) -> None:
    """One process, two, open or sealed: the same bytes; and not those of a run without compression."""
    changes = {"transport": {"compression": codec, "top_k_fraction": 0.5}}
    expected = trained(tmp_path / "one", **changes)
    assert trained(tmp_path / "two", workers=2, **changes) == expected
    assert trained(tmp_path / "sealed", workers=2, sealed=True, **changes) == expected
    assert trained(tmp_path / "none") != expected


def test_compression_goes_with_client_level_privacy(tmp_path: Path) -> None:
    """The coordinator clips what it restored, so that a lossy update costs no privacy; the run ends like any other."""
    settings = {"privacy": {"unit": "client", "noise_multiplier": 1.0}}
    for codec in ("bf16", "int8"):
        assert trained(tmp_path / codec, transport={"compression": codec}, **settings)


def test_command_line_seals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`coterie simulate --sealed` leaves the same model file as without it."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(tomli_w.dumps(tree()))
    for name, words in (("open", []), ("sealed", ["--sealed"])):
        out = ["--site", str(SITE), "--out", name, "--workers", "1", "--json"]
        assert coterie("simulate", "tiny.toml", *out, *words) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "completed"
    assert Path("open/model.safetensors").read_bytes() == Path("sealed/model.safetensors").read_bytes()


@NEEDS_RAY
@pytest.mark.slow
def test_sealed_and_compressed_on_ray(tmp_path: Path) -> None:
    """Flower's runtime on Ray carries sealed messages, and ends with the inline engine's bytes."""
    config = tmp_path / "tiny.toml"
    changes = {"data": {"clients": 3}, "transport": {"compression": "int8"}}
    config.write_text(tomli_w.dumps(tree(rounds=2, **changes)))
    words = ["simulate", str(config), "--site", str(SITE), "--engine", "ray", "--workers", "2", "--sealed"]
    with started([*words, "--out", "ray", "--json"], folder=tmp_path) as process:
        out, err = process.communicate()
        wait_until(lambda: not members(process.pid))
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "completed"
    assert coterie("simulate", config, "--site", SITE, "--workers", "1", "--out", tmp_path / "inline", "--quiet") == 0
    expected = (tmp_path / "inline" / "model.safetensors").read_bytes()
    assert (tmp_path / "ray" / "model.safetensors").read_bytes() == expected
