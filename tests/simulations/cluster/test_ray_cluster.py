"""A run over a Ray cluster: the same apps, keys and ledgers in the run folder, and machines that may go."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.privacy.ledger.partitions import partition_ledgers
from tests.helpers.processes import coterie, started, wait_until
from tests.helpers.ray_nodes import Nodes, can_hide, hidden_node, ray_nodes
from tests.helpers.runs import SITE, tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]

PRIVATE: dict[str, Any] = {
    "training": {"local_steps": 1},
    "privacy": {"unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3},
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head that trains nobody, and two nodes that do."""
    with ray_nodes(0, 1, 1) as nodes:
        yield nodes


def written(folder: Path, **changes: Any) -> Path:
    config = folder / "tiny.toml"
    config.write_text(tomli_w.dumps(tree(**{"rounds": 2, "data": {"clients": 4}, **changes})))
    return config


def on_cluster(folder: Path, address: str, *words: str, out: str = "ray", **changes: Any) -> tuple[int, str, str]:
    """A run over a cluster; its exit code, output and errors."""
    arguments = ["simulate", str(written(folder, **changes)), "--site", str(SITE), "--out", out]
    with started([*arguments, "--engine", "ray", "--ray-address", address, *words], folder=folder) as process:
        told, err = process.communicate()
    return process.returncode, told, err


def inline(folder: Path, *words: str) -> Path:
    """The same run of one process, in the folder `inline`."""
    config = folder / "tiny.toml"
    assert (
        coterie("simulate", config, "--site", SITE, "--workers", "1", "--out", folder / "inline", "--quiet", *words)
        == 0
    )
    return folder / "inline"


def model(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_model_is_that_of_the_inline_engine_to_the_byte(tmp_path: Path, nodes: Nodes) -> None:
    """Wherever a client trains, and in whatever order replies come; one JSON document, and no word on stderr."""
    code, out, err = on_cluster(tmp_path, nodes.address, "--json")
    assert code == 0, err
    assert err == ""
    assert json.loads(out)["status"] == "completed"
    assert model(tmp_path / "ray") == model(inline(tmp_path))


def test_sealed_run_reads_each_clients_keys_where_it_trains(tmp_path: Path, nodes: Nodes) -> None:
    """The model is the same, and every private key lies in a file that only its owner can read."""
    code, _, err = on_cluster(tmp_path, nodes.address, "--sealed")
    assert code == 0, err
    assert model(tmp_path / "ray") == model(inline(tmp_path))
    keys = sorted((tmp_path / "ray" / "keys").glob("*/private.json"))
    assert [path.parent.name for path in keys] == ["0", "1", "2", "3"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "ray" / "keys").stat().st_mode) == 0o700


def test_private_run_keeps_a_ledger_a_client(tmp_path: Path, nodes: Nodes) -> None:
    """Every round is in it; with fixed noise the model and what was spent are the inline engine's to the byte."""
    seeded = ("--insecure-fixed-noise", "5")
    code, _, err = on_cluster(tmp_path, nodes.address, *seeded, **PRIVATE)
    assert code == 0, err
    run, expected = tmp_path / "ray", inline(tmp_path, *seeded)
    assert model(run) == model(expected)
    ledgers = {ledger.name: ledger.standing() for ledger in partition_ledgers(run)}
    assert sorted(ledgers) == [f"client-{i:02d}" for i in range(4)]
    assert all([event.server_round for event in standing.events] == [1, 2] for standing in ledgers.values())
    assert all(standing.simulated for standing in ledgers.values())
    assert not (run / "ledgers.db").exists()
    told = [json.loads((folder / "result.json").read_text())["privacy"] for folder in (run, expected)]
    assert told[0] == told[1]


def test_secure_aggregation_runs_too(tmp_path: Path, nodes: Nodes) -> None:
    """Members keep their secrets from message to message, on whichever machine they are."""
    summed = {"privacy": {"secure_aggregation": True}, "data": {"clients": 4}}
    code, _, err = on_cluster(tmp_path, nodes.address, **summed)
    assert code == 0, err
    assert [len(entry["survivors"]) for entry in rounds(tmp_path / "ray")] == [4, 4]


def test_run_goes_on_without_a_node_that_dies(tmp_path: Path, nodes: Nodes) -> None:
    """The client that trained there fails as lost, the others count, and later rounds have everybody again."""
    site, at = trap(tmp_path)
    changes = {"model": {"name": "trap"}, "data": {"name": "one-in-trouble", "clients": 4}}
    config = written(tmp_path, rounds=3, **changes)
    with ray_nodes(0, 1, 1) as mortal:
        words = ["simulate", str(config), "--site", str(site), "--engine", "ray", "--ray-address", mortal.address]
        with started([*words, "--out", "ray"], folder=tmp_path) as process:
            wait_until(at.exists, process=process)
            wait_until(lambda: at.read_text().isdecimal())
            raylet = int(at.read_text())
            assert raylet in mortal.raylets[1:]
            os.kill(raylet, signal.SIGKILL)
            _, err = process.communicate()
    assert process.returncode == 0, err
    first, *later = rounds(tmp_path / "ray")
    assert first["failures"] == {"client-01": "client-lost"}
    assert first["survivors"] == ["client-00", "client-02", "client-03"]
    assert [entry["failures"] for entry in later] == [{}, {}]


@pytest.mark.skipif(not can_hide(), reason="this user may not have a mount namespace")
def test_node_that_does_not_share_the_folder_is_refused_by_name(tmp_path: Path, nodes: Nodes) -> None:
    """Where clients keep ledgers or keys; a plain run goes on, and says so."""
    (tmp_path / "runs").mkdir()
    with hidden_node(nodes.address, tmp_path / "runs"):
        for words, changes in (((), PRIVATE), (("--sealed",), {})):
            code, _, err = on_cluster(tmp_path, nodes.address, *words, out=f"runs/{len(words)}", **changes)
            assert code == 9
            assert "error: Ray node " in err
            assert "does not see the run folder" in err
            assert "Traceback" not in err
            assert not list((tmp_path / "runs").glob("*/ledgers/*.jsonl"))
            assert not list((tmp_path / "runs").glob("*/keys"))
        code, _, err = on_cluster(tmp_path, nodes.address, out="runs/plain")
        assert code == 0, err
        assert "ray_nodes_without_run_folder" in err
        assert model(tmp_path / "runs" / "plain") == model(inline(tmp_path))


def test_interrupted_private_run_goes_on_with_its_ledgers(tmp_path: Path, nodes: Nodes) -> None:
    """On the cluster or in one process: no round is paid twice, and none is forgotten."""
    config = written(tmp_path, rounds=4, **PRIVATE)
    words = ["simulate", str(config), "--site", str(SITE), "--engine", "ray", "--ray-address", nodes.address]
    with started([*words, "--out", "ray", "--insecure-fixed-noise", "5"], folder=tmp_path) as process:
        wait_until(lambda: (tmp_path / "ray" / "rounds.jsonl").exists() and rounds(tmp_path / "ray"), process=process)
        process.kill()
    assert coterie("simulate", "--resume", tmp_path / "ray", "--site", SITE, "--quiet") == 0
    assert model(tmp_path / "ray") == model(inline(tmp_path, "--insecure-fixed-noise", "5"))
    for ledger in partition_ledgers(tmp_path / "ray"):
        assert {event.server_round for event in ledger.events()} == {1, 2, 3, 4}


def test_ctrl_c_ends_the_run_with_a_word_on_how_to_go_on(tmp_path: Path, nodes: Nodes) -> None:
    """Also while a client trains for ever."""
    site, at = trap(tmp_path)
    config = written(tmp_path, model={"name": "trap"}, data={"name": "one-in-trouble", "clients": 4})
    words = ["simulate", str(config), "--site", str(site), "--engine", "ray", "--ray-address", nodes.address]
    with started([*words, "--out", "ray"], folder=tmp_path) as process:
        wait_until(at.exists, process=process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "--resume ray" in err
    assert "Traceback" not in err


def test_error_is_the_inline_engines(tmp_path: Path, nodes: Nodes) -> None:
    """What ends a run inside the runtime reaches the user as the same error, not as the runtime's."""
    changes = {"data": {"name": "one-in-trouble", "sites": ["client-01"]}, "model": {"options": {"trouble": "nan"}}}
    code, out, err = on_cluster(tmp_path, nodes.address, **changes)
    assert (code, out) == (9, "")
    assert "error: no client sent an update" in err
    assert "Traceback" not in err


def trap(folder: Path) -> tuple[Path, Path]:
    """A site with a model whose first training step over a marked example never ends, and where it says so."""
    at = folder / "at"
    (folder / "trap.py").write_text(TRAP.replace("FILE", repr(str(at))))
    site = folder / "site.toml"
    parts = SITE.with_name("parts.py")
    site.write_text(
        f'[models.trap]\nsource = "trap.py:trap"\n[data.one-in-trouble]\nsource = "python:{parts}:one_in_trouble"\n'
    )
    return site, at


TRAP = """
import os, threading
from pathlib import Path
from torch import nn

class Trap(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.file = nn.Linear(2, 3), Path(FILE)

    def forward(self, inputs):
        if self.training and bool((inputs[:, 2] == 7).any()) and not self.file.exists():
            self.file.write_text(str(os.getppid()))
            threading.Event().wait()
        return self.layer(inputs[:, :2])

def trap(schema):
    return Trap()
"""
