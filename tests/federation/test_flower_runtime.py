"""The same training under Flower's own runtime: same model to the byte, and nothing but ciphertext at the SuperLink."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import CliRunner

from common.config.load import parse_config
from common.flower import arrays_of
from server.flower_cli import app
from server.store import RunFolder
from simulations.inline import app_factory
from simulations.run import execute, prepare
from tests.helpers.hospitals import HOSPITALS, OPERATOR, RUN, hospital_kits
from tests.helpers.leaks import Plaintext
from tests.helpers.runs import as_bytes
from tests.helpers.superlink import Runtime, flower_runtime, settings_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("flower-runtime")]

FLOWERS, OWN = HOSPITALS
"""One site runs Flower's executor, the other one its own."""

_HOSTILE_CLIENT = """
import os, pathlib
pathlib.Path(os.environ["FLWR_HOME"], "owned").write_text("by the bundle")
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""
_HOSTILE_SERVER = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    content = RecordDict({"config": ConfigRecord({"run": "whatever"})})
    nodes = {node.node_id: node.name for node in grid.get_nodes()}
    for reply in grid.send_and_receive([Message(content, node, "train") for node in nodes]):
        said = f"error {reply.error.code}" if reply.has_error() else "obeyed"
        print(f"{nodes[reply.metadata.src_node_id]}: {said}", flush=True)
"""


@dataclass(frozen=True)
class Simulated:
    """What the same settings give in a simulation: the model, and all weights that any party sent."""

    model: dict[str, NDArray[Any]]
    sent: list[dict[str, NDArray[Any]]]


class Recording(ClientApp):
    """A ClientApp that keeps all weights that come and go."""

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self.inner = inner
        self.weights: list[dict[str, NDArray[Any]]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        came = _copy(arrays_of(message.content))
        reply = self.inner(message, context)
        self.weights += [came, _copy(arrays_of(reply.content))]
        return reply


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospital_kits(tmp_path_factory.mktemp("federation") / "kits")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, kits: Path) -> Iterator[Runtime]:
    """All of it, running."""
    executor = tmp_path_factory.mktemp("executor")
    coterie("executor", "--out", executor)
    with flower_runtime(
        tmp_path_factory.mktemp("runtime"),
        server_kit=kits / "server",
        site_kits={site: kits / site for site in HOSPITALS},
        executors={OWN: executor},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, kits: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "run.toml").write_text(RUN)
    coterie("bundle", "--run", folder / "run.toml", "--kit", kits / OPERATOR, "--out", folder / "app")
    return folder / "app"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Simulated:
    """The bundle's run with both sites on this machine."""
    run = prepare(parse_config(settings_of(bundle)["run"]), folder=tmp_path_factory.mktemp("simulated"))
    clients = Recording(app_factory(run.sites)())
    outcome = execute(run, factory=lambda: clients)
    return Simulated(model=outcome.arrays, sent=clients.weights)


class TestRun:
    def test_gives_the_simulations_model_and_leaves_only_ciphertext(
        self, runtime: Runtime, bundle: Path, kits: Path, simulated: Simulated
    ) -> None:
        """Two rounds of two hospitals: the model's bytes are the simulation's, and neither an object that the SuperLink
        ever stored, nor its database, nor any file that a process of Flower wrote holds 64 bytes in a row of the
        weights that were sent. The same bundle once more starts nothing.
        """
        status, output = runtime.run(bundle)
        assert status == "finished:completed", output
        (path,) = (kits / "server" / "state" / "runs").iterdir()
        rounds = RunFolder.open(path).rounds()
        assert [row["survivors"] for row in rounds] == [list(HOSPITALS)] * 2
        model = load_file(path / "model.safetensors")
        assert as_bytes(model) == as_bytes(dict(sorted(simulated.model.items())))

        sent = [*simulated.sent, simulated.model]
        assert len(sent) == 2 * 2 * len(HOSPITALS) + 1
        plaintext = Plaintext([values for arrays in sent for values in arrays.values()])
        stored = runtime.stored()
        assert not [place for place, blob in enumerate(stored) if plaintext.found_in(blob)]
        weights = sum(values.nbytes for values in model.values())
        assert sum(len(blob) > weights for blob in stored) >= 2 * (1 + len(HOSPITALS))  # each round's model and updates
        files = [path for path in runtime.folder.rglob("*") if path.is_file()]
        assert runtime.database in files
        assert not [path for path in files if plaintext.found_in(path.read_bytes())]

        status, output = runtime.run(bundle)
        assert status == "finished:failed"
        assert "has ended" in output

    def test_foreign_code_runs_at_flowers_executor_and_not_at_the_sites_own(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        """Whoever reaches the control API starts any code at a site that runs Flower's executor. At a site with its own
        one the installed app answers, and refuses what is not sealed.
        """
        package = tmp_path / "harmless"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "client_app.py").write_text(_HOSTILE_CLIENT)
        (package / "server_app.py").write_text(_HOSTILE_SERVER)
        (tmp_path / "pyproject.toml").write_text(
            '[project]\nname = "harmless"\nversion = "1.0.0"\ndescription = ""\ndependencies = []\n'
            '[tool.flwr.app]\npublisher = "mallory"\n[tool.flwr.app.components]\n'
            'serverapp = "harmless.server_app:app"\nclientapp = "harmless.client_app:app"\n'
        )
        status, output = runtime.run(tmp_path)
        assert status == "finished:completed", output
        assert f"{FLOWERS}: obeyed" in output
        assert f"{OWN}: error 1005" in output
        assert (runtime.folder / FLOWERS / "owned").exists()
        assert not (runtime.folder / OWN / "owned").exists()
        assert not (runtime.folder / OWN / "apps").exists()


def coterie(*words: str | Path) -> None:
    """`coterie flower`, as in a shell."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


def _copy(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: np.array(values) for name, values in arrays.items()}
