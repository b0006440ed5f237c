"""A site's process that is killed at the worst instants, and started again: the round completes."""

import os
import signal
import threading

import pytest
import torch
from flwr.app import Message

from common.flower import client_context, failure_of, stamp
from server.plane.uploads import Writing
from simulations.inline import simulated_app
from simulations.sites import SimulatedSites
from tests.helpers.agents import PRIVATE, Asker, bytes_of, configuration, make_kits, resources_of
from tests.helpers.plane import BOUND, running_plane
from tests.helpers.processes import started, wait_until

MODEL = """\
import os
import threading

from torch import nn


class Wide(nn.Module):
    '''Some megabytes; stops in the middle of training where a file says so.'''

    def __init__(self, schema):
        super().__init__()
        self.hidden = nn.Linear(schema.input_shape[0], 40_000)
        self.head = nn.Linear(40_000, schema.num_classes)

    def forward(self, inputs):
        if self.training and os.path.exists({gate!r}):
            open({fifo!r}, "w").close()
            threading.Event().wait()
        return self.head(self.hidden(inputs).relu())


def build(schema):
    return Wide(schema)
"""


@pytest.fixture
def world(tmp_path):
    """A plane and a site with a model of its own; nobody is attached yet."""
    kits = make_kits(tmp_path / "kits", sites=("cleveland",))
    site = kits / "cleveland"
    gate, fifo = tmp_path / "gate", tmp_path / "fifo"
    os.mkfifo(fifo)
    (site / "own.py").write_text(MODEL.format(gate=str(gate), fifo=str(fifo)))
    (site / "site.toml").write_text('[models.wide]\nsource = "own.py:build"\n')
    with running_plane(kits, tmp_path / "hub") as plane:
        kit_file = site / "kit.toml"
        kit_file.write_text(kit_file.read_text().replace("127.0.0.1:8471", plane.address))
        yield plane


def run_of(*overrides):
    return configuration("model.name=wide", "training.local_steps=1", *overrides)


def client(plane):
    """`coterie client` as a process."""
    return started(["client", "--kit", str(plane.kits / "cleveland"), "--grace", "0"], folder=plane.kits)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait(BOUND)


class Stop:
    """An instant of the coordinator at which a test does something."""

    def __init__(self, monkeypatch, owner, name, *, at=1):
        real, count = getattr(owner, name), iter(range(1, 1_000_000))
        self.reached, self.go = threading.Event(), threading.Event()

        def stopping(*arguments):
            if next(count) == at:
                self.reached.set()
                assert self.go.wait(BOUND)
            return real(*arguments)

        monkeypatch.setattr(owner, name, stopping)


def in_training(plane, monkeypatch):
    """The process is within its first step."""
    gate, fifo = plane.kits.parent / "gate", plane.kits.parent / "fifo"
    gate.touch()

    def wait():
        fifo.read_text()
        gate.unlink()
        return lambda: None

    return wait


def in_upload(plane, monkeypatch):
    """A megabyte of the update has come."""
    stop = Stop(monkeypatch, Writing, "append", at=2)

    def wait():
        assert stop.reached.wait(BOUND)
        return stop.go.set

    return wait


def before_the_receipt(plane, monkeypatch):
    """All of it has come, and nobody has said so."""
    stop = Stop(monkeypatch, plane.hub, "answered")

    def wait():
        assert stop.reached.wait(BOUND)
        return stop.go.set

    return wait


@pytest.mark.parametrize("moment", [in_training, in_upload, before_the_receipt], ids=lambda moment: moment.__name__)
@pytest.mark.parametrize("overrides", [(), pytest.param(PRIVATE, marks=pytest.mark.slow)], ids=["plain", "private"])
def test_a_site_that_was_killed_completes_its_round(world, monkeypatch, moment, overrides):
    """Without privacy to the byte; with it, an update that was stored is sent as it was, and paid for once."""
    config, asker = run_of(*overrides), Asker(world, site=resources_of(world).site)
    wait = moment(world, monkeypatch)
    with client(world) as process:
        asking = asker.begin(config)
        resume = wait()
        kill(process)
        resume()
    resources = resources_of(world)
    with client(world):
        reply = asking.reply()
        assert failure_of(reply) is None
        wait_until(lambda: not list((resources.kit.state / "outbox").iterdir()))
        events = resources.ledgers.named("heart").events()
        assert bytes_of(asker.ask(config)) == bytes_of(reply), "asked again, it sends what it has stored"
    assert resources.ledgers.named("heart").events() == events
    assert len(events) == (2 if moment is in_training else 1), "what was lost before it was stored was paid for"
    if not overrides:
        assert bytes_of(reply) == bytes_of(undisturbed(world, config, asker.request(config)))


def undisturbed(plane, config, content):
    """The answer of a simulated client with the same model and data."""
    torch.set_num_threads(1)  # as the site's process has it
    sites = SimulatedSites(config=config, folder=plane.kits, site_file=plane.kits / "cleveland" / "site.toml")
    place = [one.name for one in sites.federation.clients].index("cleveland")
    message = stamp(Message(content, 2, "train"), message_id="m")
    return simulated_app(sites)(message, client_context(node_id=2, partition=place))


def test_sigterm_ends_it_in_good_order(world, monkeypatch):
    """What is at hand is sent, the exit code is 0; a second process on the same kit is refused meanwhile."""
    config, asker = run_of(), Asker(world, site=resources_of(world).site)
    stop = Stop(monkeypatch, world.hub, "answered")
    arguments = ["client", "--kit", str(world.kits / "cleveland")]
    with started([*arguments, "--grace", str(BOUND), "--json"], folder=world.kits) as process:
        asking = asker.begin(config)
        assert stop.reached.wait(BOUND)
        with started(arguments, folder=world.kits) as second:
            _, error = second.communicate(timeout=BOUND)
            assert second.returncode == 9
            assert "already" in error
        process.terminate()
        stop.go.set()
        out, _ = process.communicate(timeout=BOUND)
        assert process.returncode == 0
        assert '"updates_left": 0' in out
    assert failure_of(asking.reply()) is None


def test_a_second_signal_ends_it_at_once(world, monkeypatch):
    """In the middle of training; the order is answered by the next process."""
    config, asker = run_of(), Asker(world, site=resources_of(world).site)
    wait = in_training(world, monkeypatch)
    arguments = ["client", "--kit", str(world.kits / "cleveland"), "--grace", str(10 * BOUND)]
    with started(arguments, folder=world.kits) as process:
        asking = asker.begin(config)
        wait()
        process.terminate()
        while '"draining"' not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        process.wait(BOUND)
        assert process.returncode == 130
    with client(world):
        assert failure_of(asking.reply()) is None
