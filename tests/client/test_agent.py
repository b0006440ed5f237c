"""The site's process: an order is answered once, whatever becomes of connections, and nothing that is ready is lost."""

import errno
import threading
from dataclasses import replace

import pytest
from flwr.app import Message

from client import outbox as outbox_module
from client.agent import make_agent
from client.connection import Patience
from common.errors import FailureCode, UnreachableError
from common.flower import client_context, failure_of, stamp
from server.plane.orders import Failed
from server.plane.server import PlaneServer
from simulations.inline import simulated_app
from simulations.sites import SimulatedSites
from tests.helpers.agents import (
    PRIVATE,
    QUICK,
    Asker,
    bytes_of,
    configuration,
    copied,
    gated,
    make_kits,
    resources_of,
    running_agent,
)
from tests.helpers.plane import BOUND, kit, running_plane
from tests.helpers.processes import wait_until


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("made") / "kits")


@pytest.fixture
def kits(made, tmp_path):
    return copied(made, tmp_path / "kits")


@pytest.fixture
def plane(kits, tmp_path):
    with running_plane(kits, tmp_path / "hub", watch_seconds=0.01) as plane:
        yield plane


def events_of(resources):
    return resources.ledgers.named("heart").events()


def restarted(plane):
    """The coordinator's port closes and opens again; what it has ordered stays open."""
    plane.server.stop(grace=0)
    plane.server = PlaneServer(
        kit(plane.kits, "server"), host="127.0.0.1", port=plane.server.port, hub=plane.hub, desk=None
    )
    plane.server.start()
    plane.closing.append(plane.server.stop)


def test_a_round_gives_the_bytes_of_a_simulation(plane, tmp_path):
    """The same client, the same examples, the same update."""
    config, asker = configuration(), Asker(plane)
    sites = SimulatedSites(config=config, folder=tmp_path)
    place = [client.name for client in sites.federation.clients].index("cleveland")
    message = stamp(Message(asker.request(config), 2, "train"), message_id="m")
    expected = simulated_app(sites)(message, client_context(node_id=2, partition=place))
    with running_agent(resources_of(plane)):
        assert bytes_of(asker.ask(config)) == bytes_of(expected)


def test_asked_again_a_site_sends_the_same_bytes_and_pays_once(plane):
    """With and without privacy, and whichever process is asked."""
    resources, asker = resources_of(plane), Asker(plane)
    for count, config in enumerate((configuration(*PRIVATE), configuration()), start=1):
        with running_agent(resources):
            first = asker.ask(config)
        with running_agent(resources):
            again = asker.ask(config)
        assert bytes_of(again) == bytes_of(first)
        assert len(events_of(resources)) == count


def test_an_order_that_comes_twice_is_worked_on_once(plane):
    """A stream that is opened anew may bring what the former one brought."""
    resources, asker = resources_of(plane), Asker(plane)
    gate = gated(resources)
    with running_agent(resources, app=gate):
        asking = asker.begin(configuration())
        assert gate.entered.wait(BOUND)
        (order,) = plane.hub.book.of_site("cleveland")
        plane.hub._attached["cleveland"].session.post(plane.hub.book.event(order))
        restarted(plane)
        plane.seen.wait_for("attached", count=2)
        gate.open.set()
        assert failure_of(asking.reply()) is None
        assert failure_of(asker.ask(configuration(), server_round=2)) is None
    assert gate.calls == 2
    assert plane.seen.kinds().count("order-sent") == 2, "the second stream said that it was held"


def test_nothing_is_fetched_that_was_not_sealed_for_the_site(plane):
    """Whoever has the coordinator's certificate, but not its identity key, cannot fill a site's disk."""
    with running_agent(resources_of(plane)):
        plane.hub.wait_attached(["cleveland"])
        plane.order("cleveland", envelope=bytes(1566)).blob.unlink()  # a fetch would fail, again and again
        failed = plane.result()
    assert isinstance(failed, Failed)
    assert failed.failure is FailureCode.INVALID_REQUEST


def test_an_order_that_nobody_waits_for_leaves_nothing(plane):
    """Its update is dropped when it is ready; the next order is answered."""
    resources, asker = resources_of(plane), Asker(plane)
    gate = gated(resources)
    with running_agent(resources, app=gate) as agent:
        asker.begin(configuration())
        assert gate.entered.wait(BOUND)
        (order,) = plane.hub.book.of_site("cleveland")
        plane.hub.cancel(order.message_id)
        gate.open.set()
        assert failure_of(asker.ask(configuration(), server_round=2)) is None
        wait_until(lambda: not len(agent.outbox))
    assert plane.seen.kinds().count("answer-received") == 1
    assert not list((resources.kit.state / "inbox").iterdir())


class TestTheCoordinatorIsGone:
    """The site goes on, and comes back by itself."""

    def test_and_back_with_its_orders(self, plane):
        """What was being worked on meanwhile arrives."""
        resources, asker = resources_of(plane), Asker(plane)
        gate = gated(resources)
        with running_agent(resources, app=gate):
            asking = asker.begin(configuration())
            assert gate.entered.wait(BOUND)
            plane.server.stop(grace=0)
            gate.open.set()
            restarted(plane)
            assert failure_of(asking.reply()) is None

    def test_and_back_without_them(self, kits, tmp_path):
        """A new process knows no order: the update is dropped, asked for anew, and sent again to the byte."""
        config = configuration(*PRIVATE)
        with running_plane(kits, tmp_path / "first") as first:
            resources = resources_of(first)
            gate = gated(resources)
            port = first.server.port
            with running_agent(resources, app=gate) as agent:
                Asker(first).begin(config)
                assert gate.entered.wait(BOUND)
                first.server.stop(grace=0)
                gate.open.set()
                with running_plane(kits, tmp_path / "second", port=port) as second:
                    reply = Asker(second).ask(config)
                    assert failure_of(reply) is None
                    wait_until(lambda: not len(agent.outbox))
                assert gate.calls == 2
        assert len(events_of(resources)) == 1

    def test_from_the_start(self, kits, tmp_path):
        """It waits."""
        with running_plane(kits, tmp_path / "hub") as plane:
            resources, port = resources_of(plane), plane.server.port
        with running_agent(resources), running_plane(kits, tmp_path / "hub2", port=port) as plane:
            assert failure_of(Asker(plane).ask(configuration())) is None

    def test_a_failure_that_it_missed_is_told_again(self, plane):
        """A run that the site refuses while nobody listens."""
        resources, asker = resources_of(plane), Asker(plane)
        gate = gated(resources)
        with running_agent(resources, app=gate) as agent:
            asking = asker.begin(configuration(), cohort='["cleveland"]')
            assert gate.entered.wait(BOUND)
            plane.server.stop(grace=0)
            gate.open.set()
            restarted(plane)
            assert failure_of(asking.reply()) is FailureCode.POLICY_REFUSED
            wait_until(lambda: agent.held() == [])


class TestDraining:
    """SIGTERM: no new order, what is at hand is finished and sent."""

    def test_what_is_worked_on_is_finished_and_sent(self, plane):
        """Then the process ends, and the order that waited stays with the coordinator."""
        resources, asker = resources_of(plane), Asker(plane)
        gate = gated(resources)
        with running_agent(resources, app=gate) as agent:
            asking = asker.begin(configuration())
            assert gate.entered.wait(BOUND)
            waiting = asker.begin(configuration(), server_round=2)
            plane.seen.wait_for("order-sent", count=2)
            agent.drain(BOUND)
            gate.open.set()
            assert failure_of(asking.reply()) is None
            plane.seen.wait_for("detached")
            assert gate.calls == 1
        with running_agent(resources):
            assert failure_of(waiting.reply()) is None

    def test_it_ends_with_the_grace(self, plane):
        """Training that does not end is left; its order stays open."""
        resources, asker = resources_of(plane), Asker(plane)
        gate = gated(resources)
        with running_agent(resources, app=gate) as agent:
            asking = asker.begin(configuration())
            assert gate.entered.wait(BOUND)
        assert agent.working
        with running_agent(resources):
            assert failure_of(asking.reply()) is None
        gate.open.set()

    def test_what_cannot_be_sent_waits_on_the_disk(self, plane):
        """For the next process."""
        resources, asker = resources_of(plane), Asker(plane)
        gate = gated(resources)
        with running_agent(resources, app=gate) as agent:
            asking = asker.begin(configuration())
            assert gate.entered.wait(BOUND)
            plane.server.stop(grace=0)
            gate.open.set()
            wait_until(lambda: len(agent.outbox))
        restarted(plane)
        with running_agent(resources) as agent:
            assert failure_of(asking.reply()) is None
            wait_until(lambda: not len(agent.outbox))


def test_a_full_disk_costs_the_order_and_nothing_else(plane, monkeypatch):
    """A typed failure; asked again, the site sends what it had paid for."""
    resources, asker, full = resources_of(plane), Asker(plane), threading.Event()
    real = outbox_module._put_blob

    def put(blob, path):
        if not full.is_set():
            full.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        real(blob, path)

    monkeypatch.setattr(outbox_module, "_put_blob", put)
    with running_agent(resources):
        assert failure_of(asker.ask(configuration(*PRIVATE))) is FailureCode.CLIENT_FAILED
        assert failure_of(asker.ask(configuration(*PRIVATE))) is None
    assert len(events_of(resources)) == 1


def test_two_processes_with_one_identity(plane):
    """The second gives up, with a hint that keys may have been copied; the first works on."""
    resources = resources_of(plane)
    with running_agent(resources):
        plane.seen.wait_for("attached")
        with pytest.raises(UnreachableError, match="another client") as caught:
            make_agent(resources, patience=replace(QUICK, elsewhere_seconds=0.0)).run()
        assert "copied" in caught.value.hint
        assert failure_of(Asker(plane).ask(configuration())) is None


def test_a_site_that_is_shut_out_tries_on_and_comes_back(plane):
    """A deny list can be mended."""
    resources, denied = resources_of(plane), plane.kits / "server" / "denied.txt"
    before = denied.read_text() if denied.exists() else ""
    with running_agent(resources, patience=replace(QUICK, longest_pause=0.02)):
        plane.seen.wait_for("attached")
        denied.write_text("cleveland\n")
        plane.seen.wait_for("refused", party="cleveland")
        denied.write_text(before)
        plane.seen.wait_for("attached", count=2)


def test_a_coordinator_that_says_nothing_is_left_and_tried_again(plane, monkeypatch):
    """A connection on which nothing comes is no connection."""
    attempts = threading.Semaphore(0)
    monkeypatch.setattr(plane.hub, "attach", lambda *_: attempts.release())
    with running_agent(resources_of(plane), patience=Patience(first_pause=0.01, unheard_seconds=0.3)):
        assert attempts.acquire(timeout=BOUND)
        assert attempts.acquire(timeout=BOUND)


def test_a_certificate_that_ends_soon_is_renewed_and_used(plane, monkeypatch):
    """With a new key; the next connection shows it."""
    resources = resources_of(plane)
    before = resources.kit.tls()
    due = iter([True])
    monkeypatch.setattr("client.agent.is_due", lambda _: next(due, False))
    with running_agent(resources):
        plane.seen.wait_for("renewed", party="cleveland")
        restarted(plane)
        plane.seen.wait_for("attached", count=2)
    after = resources.kit.tls()
    assert after.chain != before.chain
    assert after.key != before.key


def test_what_compression_left_out_is_kept_over_a_restart(plane):
    """Top-k adds it to the next update, whichever process makes that."""
    config, asker = configuration("transport.compression=top-k", "transport.top_k_fraction=0.1"), Asker(plane)
    through = []
    resources = resources_of(plane)
    for restarts in (False, True):
        run = replace(asker, run_id=bytes([len(through)] * 16))
        with running_agent(resources):
            first = run.ask(config)
            second = None if restarts else run.ask(config, server_round=2)
        with running_agent(resources):
            second = second or run.ask(config, server_round=2)
        through.append((bytes_of(first), bytes_of(second)))
    assert through[0] == through[1]
