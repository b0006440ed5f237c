"""A run from a bundle, as both apps do it under Flower's own runtime, here without its processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file
from typer.testing import CliRunner

from client.flower_app import SiteApp
from common.crypto import SealError
from common.disk import acquire_lock
from common.errors import ConfigError, FailureCode, KitError, RefusedError, RunError
from common.flower import failure_of
from common.flower_runtime import KIT_VARIABLE, read_settings
from common.kit import Kit, load_kit
from common.transport.sealed import read_sealed
from server.flower_cli import WARNING, app
from server.flower_run import Order, carry_out, read_order
from server.grids.base import FIRST_NODE
from server.provisioning.denied import deny
from server.store import RunFolder
from simulations.inline import InlineGrid
from simulations.run import execute, prepare
from tests.helpers.hospitals import HOSPITALS, OPERATOR, RUN, hospital_kits
from tests.helpers.runs import as_bytes
from tests.helpers.superlink import settings_of


class Sites:
    """An engine over the sites' own apps, each with its kit in the node's settings; keeps all that passed."""

    def __init__(self, kits: Path) -> None:
        self.kits = kits
        self.passed: list[Message] = []
        self.answers_left = 1_000
        self.before_answer: Callable[[], object] = lambda: None

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:
        for message in messages:
            if not self.answers_left:
                raise KeyboardInterrupt
            self.answers_left -= 1
            self.before_answer()
            node = message.metadata.dst_node_id
            settings = {"kit": str(self.kits / HOSPITALS[node - FIRST_NODE])}
            context = Context(run_id=1, node_id=node, node_config=settings, state=RecordDict(), run_config={})
            reply = SiteApp()(message, context)  # made anew for every message, as Flower does
            self.passed += [message, reply]
            yield reply

    def close(self) -> None:
        """Nothing to let go of."""


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    return hospital_kits(tmp_path / "kits")


@pytest.fixture
def bundle(tmp_path: Path, kits: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    done = write(tmp_path / "run.toml", kits, tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    return tmp_path / "bundle"


@pytest.fixture
def server(kits: Path) -> Kit:
    return load_kit(kits / "server", role="coordinator")


@pytest.fixture
def order(bundle: Path, server: Kit) -> Order:
    text, authorization = read_settings(settings_of(bundle))
    return read_order(server, text=text, authorization=authorization)


def write(run: Path, kits: Path, out: Path, *words: str):
    words = ("--run", str(run), "--kit", str(kits / OPERATOR), "--out", str(out), *words)
    return CliRunner().invoke(app, ["bundle", *words])


def carry(order: Order, server: Kit, sites: Sites) -> RunFolder:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    carry_out(order, server, InlineGrid(sites, HOSPITALS), context)
    return RunFolder.open(server.state / "runs" / order.run_id)


class TestRun:
    def test_gives_the_simulations_model(self, order: Order, server: Kit, kits: Path, tmp_path: Path) -> None:
        """The same settings in a simulation end with the same bytes, and nothing passes that is not sealed."""
        sites = Sites(kits)
        folder = carry(order, server, sites)
        expected = execute(prepare(order.config, folder=tmp_path / "simulated")).arrays
        assert as_bytes(load_file(folder.path / "model.safetensors")) == as_bytes(dict(sorted(expected.items())))
        assert len(sites.passed) == 2 * 2 * len(HOSPITALS)
        for message in sites.passed:
            read_sealed(message.content)

    def test_asynchronous_run_gives_the_simulations_model(self, server: Kit, kits: Path, tmp_path: Path) -> None:
        """What stays open between two steps does so over Flower's runtime, too, and an interruption changes nothing."""
        for site in HOSPITALS:
            policy = kits / site / "policy.toml"
            policy.write_text(policy.read_text().replace("[limits]", "[limits]\nsmallest_cohort = 1"))
        (tmp_path / "run.toml").write_text(
            f"{RUN}\n[asynchronous]\nbuffer_size = 1\n".replace("rounds = 2", "rounds = 4")
        )
        assert write(tmp_path / "run.toml", kits, tmp_path / "bundle").exit_code == 0
        text, authorization = read_settings(settings_of(tmp_path / "bundle"))
        order = read_order(server, text=text, authorization=authorization)
        sites = Sites(kits)
        sites.answers_left = len(HOSPITALS) + 1
        with pytest.raises(KeyboardInterrupt):
            carry(order, server, sites)
        sites.answers_left = 1_000
        folder = carry(order, server, sites)
        expected = execute(prepare(order.config, folder=tmp_path / "simulated")).arrays
        assert as_bytes(load_file(folder.path / "model.safetensors")) == as_bytes(dict(sorted(expected.items())))
        assert [list(row["staleness"].values()) for row in folder.rounds()] == [[0], [1], [1], [1]]
        for message in sites.passed:
            read_sealed(message.content)

    def test_interrupted_run_goes_on_where_it_was(self, order: Order, server: Kit, kits: Path, tmp_path: Path) -> None:
        """The same bundle started again does the rounds that are left, to the same bytes."""
        sites = Sites(kits)
        sites.answers_left = len(HOSPITALS) + 1
        with pytest.raises(KeyboardInterrupt):
            carry(order, server, sites)
        sites.answers_left, before = 1_000, len(sites.passed)
        folder = carry(order, server, sites)
        assert len(sites.passed) - before == 2 * len(HOSPITALS)
        expected = execute(prepare(order.config, folder=tmp_path / "simulated")).arrays
        assert as_bytes(load_file(folder.path / "model.safetensors")) == as_bytes(dict(sorted(expected.items())))

    def test_a_denied_operators_bundle_starts_nothing(self, bundle: Path, server: Kit) -> None:
        """However good the signature is."""
        deny(server.folder, OPERATOR)
        text, authorization = read_settings(settings_of(bundle))
        with pytest.raises(RefusedError, match="operator denied"):
            read_order(server, text=text, authorization=authorization)

    def test_a_run_ends_before_the_next_round_once_its_operator_is_denied(
        self, order: Order, server: Kit, kits: Path
    ) -> None:
        """The sites are not asked for another round."""
        sites = Sites(kits)
        sites.before_answer = lambda: deny(server.folder, OPERATOR)
        with pytest.raises(RefusedError, match="operator denied"):
            carry(order, server, sites)
        assert len(sites.passed) == 2 * len(HOSPITALS)

    def test_ended_run_starts_nothing(self, order: Order, server: Kit, kits: Path) -> None:
        """An authorization is for one run: the bundle started once more asks nobody."""
        carry(order, server, Sites(kits))
        again = Sites(kits)
        with pytest.raises(RunError, match="has ended"):
            carry(order, server, again)
        assert not again.passed

    def test_site_that_is_shut_out_is_not_asked(self, order: Order, server: Kit, kits: Path) -> None:
        """The deny list counts from the next round on, without a restart."""
        (kits / "server" / "denied.txt").write_text("hungary\n")
        policy = kits / "cleveland" / "policy.toml"
        policy.write_text(policy.read_text() + "smallest_cohort = 1\n")
        folder = carry(order, server, sites := Sites(kits))
        assert {message.metadata.dst_node_id for message in sites.passed[::2]} == {FIRST_NODE}
        assert [row["survivors"] for row in folder.rounds()] == [["cleveland"]] * 2


class TestOrder:
    def test_another_configuration_is_refused(self, bundle: Path, server: Kit) -> None:
        """Settings that `flwr run --run-config` changed on the way start nothing."""
        text, authorization = read_settings(settings_of(bundle))
        with pytest.raises(RefusedError, match="signed another configuration"):
            read_order(server, text=text.replace('"rounds":2', '"rounds":3'), authorization=authorization)

    def test_unknown_operator_is_refused(self, bundle: Path, server: Kit, tmp_path: Path) -> None:
        """An operator of another federation of the same name is nobody here."""
        others = hospital_kits(tmp_path / "others")
        assert write(tmp_path / "run.toml", others, tmp_path / "forged").exit_code == 0
        text, authorization = read_settings(settings_of(tmp_path / "forged"))
        with pytest.raises(SealError) as caught:
            read_order(server, text=text, authorization=authorization)
        assert caught.value.layer == "signature"

    @pytest.mark.parametrize("change", ['data.sites=["lima"]', "data.pooled=true", "simulation.byzantine_clients=1"])
    def test_impossible_run_is_refused_before_its_bundle_is_written(
        self, change: str, kits: Path, tmp_path: Path
    ) -> None:
        """The operator hears it at once, not after a deployment."""
        (tmp_path / "run.toml").write_text(RUN)
        done = write(tmp_path / "run.toml", kits, tmp_path / "bundle", "--set", change)
        assert isinstance(done.exception, ConfigError)
        assert not (tmp_path / "bundle").exists()

    def test_only_an_operators_kit_signs(self, kits: Path, tmp_path: Path) -> None:
        """A site cannot order a run."""
        (tmp_path / "run.toml").write_text(RUN)
        words = ("--run", str(tmp_path / "run.toml"), "--kit", str(kits / "cleveland"), "--out", str(tmp_path / "b"))
        assert isinstance(CliRunner().invoke(app, ["bundle", *words]).exception, KitError)


class TestSite:
    def test_without_a_kit_only_a_code_leaves(
        self, order: Order, server: Kit, kits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The site's own log says what is missing; the peer gets a fixed sentence."""
        monkeypatch.delenv(KIT_VARIABLE, raising=False)
        sites = Sites(kits)
        carry(order, server, sites)
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        reply = SiteApp()(sites.passed[0], context)
        assert failure_of(reply) is FailureCode.CLIENT_FAILED
        assert reply.error.reason == FailureCode.CLIENT_FAILED.sentence
        assert KIT_VARIABLE in capsys.readouterr().out

    def test_an_order_is_not_taken_twice(self, order: Order, server: Kit, kits: Path) -> None:
        """Whoever replays a message finds that the kit remembers it, though the process that took it is gone."""
        sites = Sites(kits)
        carry(order, server, sites)
        settings = {"kit": str(kits / HOSPITALS[0])}
        context = Context(run_id=1, node_id=FIRST_NODE, node_config=settings, state=RecordDict(), run_config={})
        assert failure_of(SiteApp()(sites.passed[0], context)) is FailureCode.INVALID_REQUEST

    def test_does_not_work_beside_another_client(self, order: Order, server: Kit, kits: Path) -> None:
        """A kit that `coterie client` works with is not used by a SuperNode at the same time."""
        acquire_lock(load_kit(kits / "hungary", role="site").state / "client.lock")
        folder = carry(order, server, Sites(kits))
        assert [row["failures"] for row in folder.rounds()] == [{"hungary": "client-failed"}] * 2


class TestCommand:
    @pytest.mark.parametrize("words", [[], ["executor", "--out", "executor"]])
    def test_every_use_warns(self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What does not hold under Flower's own runtime is said each time, on stderr."""
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0
        assert WARNING in done.stderr
        assert "not sovereign" in WARNING
