"""Blobs and updates over a connection that breaks: what is there is never sent again, and it is the same bytes."""

import hashlib
import os
import threading

import pytest

from client.connection import Connection
from client.outbox import Outbox
from client.transfer import UnwantedError, fetch_blob, send_update
from common.errors import PeerError
from common.kit import load_kit
from common.transport import wire_pb2
from common.transport.channel import PlaneCalls
from common.transport.sealed import Blob
from common.transport.wire import FRAME_BYTES
from server.plane.uploads import Writing
from tests.helpers.agents import QUICK, make_kits, resources_of
from tests.helpers.plane import BOUND, running_plane

DATA = os.urandom(3 * FRAME_BYTES + 12345)


class Quiet:
    """A listener that does nothing but say when it is attached."""

    def __init__(self, held=()):
        self.ready, self.orders, self._held = threading.Event(), [], list(held)

    def held(self):
        return self._held

    def status(self):
        return b"", "idle"

    def attached(self):
        self.ready.set()

    def ordered(self, order):
        self.orders.append(order)

    def cancelled(self, message_id):
        pass

    def received(self, message_id):
        pass


@pytest.fixture
def plane(tmp_path):
    kits = make_kits(tmp_path / "kits", sites=("cleveland",))
    with running_plane(kits, tmp_path / "hub") as plane:
        yield plane


@pytest.fixture
def connection(plane):
    """An attached connection."""
    listener = Quiet()
    connection = Connection(resources_of(plane).kit, listener, patience=QUICK)
    thread = threading.Thread(target=connection.run, daemon=True)
    thread.start()
    assert listener.ready.wait(BOUND)
    yield connection
    connection.close()
    thread.join(BOUND)
    assert not thread.is_alive()


def order_of(plane, data=DATA, **changes) -> wire_pb2.Order:
    order = plane.order("cleveland", data)
    fields = {"message_id": order.message_id, "blob_digest": order.blob_digest, "blob_bytes": order.blob_bytes}
    return wire_pb2.Order(**fields | changes)


def always() -> bool:
    return True


class Breaking:
    """Breaks every fetch but the third after its first frame."""

    def __init__(self, monkeypatch):
        self.offsets = []
        real = PlaneCalls.fetch

        def fetch(calls, digest, *, offset=0):
            self.offsets.append(offset)
            stream = real(calls, digest, offset=offset)
            return stream if len(self.offsets) == 3 else Cut(stream)

        monkeypatch.setattr(PlaneCalls, "fetch", fetch)


class Cut:
    """A stream that breaks after one frame."""

    def __init__(self, stream):
        self._stream = stream

    def __iter__(self):
        yield next(self._stream)
        self._stream.cancel()
        yield from self._stream

    def cancel(self):
        return self._stream.cancel()


class TestFetching:
    """The ciphertext of an order."""

    def test_a_break_costs_nothing_that_was_there(self, plane, connection, tmp_path, monkeypatch):
        """Each attempt begins where the one before ended."""
        breaking = Breaking(monkeypatch)
        path = fetch_blob(connection, order_of(plane), tmp_path, wanted=always)
        assert path.read_bytes() == DATA
        assert breaking.offsets == [0, FRAME_BYTES, 2 * FRAME_BYTES]

    def test_nor_does_a_restart(self, plane, connection, tmp_path, monkeypatch):
        """What a former process had fetched lies under the blob's digest."""
        breaking = Breaking(monkeypatch)
        breaking.offsets += [-1, -1]
        (tmp_path / f"{hashlib.sha256(DATA).hexdigest()}.part").write_bytes(DATA[:1000])
        assert fetch_blob(connection, order_of(plane), tmp_path, wanted=always).read_bytes() == DATA
        assert breaking.offsets == [-1, -1, 1000]

    def test_more_than_was_announced_is_refused(self, plane, connection, tmp_path):
        """And never written."""
        with pytest.raises(PeerError):
            fetch_blob(connection, order_of(plane, blob_bytes=FRAME_BYTES + 1), tmp_path, wanted=always)
        assert all(path.stat().st_size <= FRAME_BYTES + 1 for path in tmp_path.glob("*.part"))

    def test_an_order_that_is_closed_is_not_waited_for(self, plane, connection, tmp_path):
        """The coordinator does not know its blob any more; or this process says so."""
        order = order_of(plane)
        with pytest.raises(UnwantedError):
            fetch_blob(connection, order, tmp_path, wanted=lambda: False)
        plane.hub.cancel(order.message_id)
        with pytest.raises(UnwantedError):
            fetch_blob(connection, order, tmp_path, wanted=always)


class TestSending:
    """A stored update."""

    @staticmethod
    def stored(order, folder):
        return Outbox(folder).add(
            order.message_id, b"envelope", Blob.of_bytes(DATA), run_id=bytes(16), request_id=bytes(16)
        )

    def test_a_break_costs_nothing_that_was_there(self, plane, connection, tmp_path, monkeypatch):
        """The coordinator writes each byte once."""
        written, real = [], Writing.append

        def append(writing, frame):
            real(writing, frame)
            written.append(len(frame))
            if len(written) == 2:
                connection._stream.cancel()  # the whole connection goes, and comes back

        monkeypatch.setattr(Writing, "append", append)
        update = self.stored(order_of(plane), tmp_path / "outbox")
        send_update(connection, update, wanted=always)
        answer = plane.result()
        assert answer.path.read_bytes() == DATA
        assert sum(written) == len(DATA)

    def test_an_update_that_is_there_already_is_not_sent_again(self, plane, connection, tmp_path, monkeypatch):
        """A receipt can be lost."""
        update = self.stored(order_of(plane), tmp_path / "outbox")
        send_update(connection, update, wanted=always)
        monkeypatch.setattr(Writing, "append", None)
        send_update(connection, update, wanted=always)

    def test_an_update_that_nobody_wants_is_given_up(self, plane, connection, tmp_path):
        """Its order is closed; or this process says so."""
        order = order_of(plane)
        update = self.stored(order, tmp_path / "outbox")
        with pytest.raises(UnwantedError):
            send_update(connection, update, wanted=lambda: False)
        plane.hub.cancel(order.message_id)
        with pytest.raises(UnwantedError):
            send_update(connection, update, wanted=always)

    def test_a_full_disk_at_the_coordinator_is_waited_for(self, plane, connection, tmp_path, monkeypatch):
        """The update stays here until there is room."""
        real, tries = os.pwrite, []

        def full(descriptor, data, at):
            tries.append(at)
            if len(tries) <= 3:
                raise OSError(28, os.strerror(28))
            return real(descriptor, data, at)

        monkeypatch.setattr("server.plane.uploads.os.pwrite", full)
        send_update(connection, self.stored(order_of(plane), tmp_path / "outbox"), wanted=always)
        assert plane.result().path.read_bytes() == DATA


def test_what_waits_ends_when_the_connection_is_closed(plane, tmp_path):
    """Nobody is attached, and nobody will be."""
    connection = Connection(load_kit(plane.kits / "cleveland", role="site"), Quiet(), patience=QUICK)
    connection.close()
    with pytest.raises(UnwantedError):
        fetch_blob(connection, order_of(plane), tmp_path, wanted=always)
