"""What one peer can take of the coordinator: places, calls, time, disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from typing import Any

import pytest

from common.transport import wire_pb2
from common.transport.wire import FRAME_BYTES
from server.plane.bulk import Bulk
from tests.helpers.plane import BOUND, SITES, Plane, Tap, in_thread, refused, upload


def test_so_many_uploads_are_taken_in_at_once_and_the_others_wait(
    start: Callable[..., Plane], monkeypatch: pytest.MonkeyPatch
):
    """With two places six uploads finish, never more than two at once: the rest is held back, not refused."""
    plane = start(uploads=2)
    open_now, most, receive = set(), [], Bulk._receive

    async def watched(bulk: Bulk, site: str, begin: wire_pb2.UploadStart, context: Any) -> bytes:
        open_now.add(begin.message_id)
        most.append(len(open_now))
        try:
            return await receive(bulk, site, begin, context)
        finally:
            open_now.discard(begin.message_id)

    monkeypatch.setattr(Bulk, "_receive", watched)
    blob, taps = os.urandom(1000), [Tap([]) for _ in range(6)]
    with ExitStack() as stack:
        done = []
        for number, tap in enumerate(taps):
            order, calls = plane.order(SITES[number % len(SITES)]), plane.calls(SITES[number % len(SITES)])
            done.append(stack.enter_context(in_thread(partial(upload, calls, order, blob, frames=tap))))
            tap.put(blob)
        while len(open_now) < 2:
            pass
        assert plane.results.empty()
        for tap in taps:
            tap.end()
        assert all(one.get(timeout=BOUND).complete for one in done)
    assert {plane.result().path.read_bytes() for _ in range(6)} == {blob}
    assert max(most) == 2


def test_a_peer_that_stops_sending_loses_its_place(start: Callable[..., Plane]):
    """Slow loris: after a frame comes nothing; another upload gets the one place, and the first can be continued."""
    plane = start(uploads=1, idle_seconds=0.2)
    slow, quick = plane.order("hospital-a"), plane.order("hospital-b")
    tap, blob = Tap([]), os.urandom(1000)
    with in_thread(lambda: upload(plane.calls("hospital-a"), slow, blob, frames=tap)) as done:
        tap.put(blob[:10])
        while plane.hub.uploads.received(slow.message_id) < 10:
            pass
        assert upload(plane.calls("hospital-b"), quick, blob).complete
        assert done.get() == "silent"
        tap.end()
    assert upload(plane.calls("hospital-a"), slow, blob, offset=10).complete


def test_a_site_that_opens_its_upload_again_and_again_holds_one_place(start: Callable[..., Plane]):
    """The stream before loses its place at once, not only when it has been silent for long; others get theirs."""
    plane = start(uploads=2, idle_seconds=BOUND * 10)
    order, other, blob = plane.order("hospital-a"), plane.order("hospital-b"), os.urandom(1000)
    calls, taps = plane.calls("hospital-a"), [Tap([]) for _ in range(4)]
    with ExitStack() as stack:
        before = None
        for number, tap in enumerate(taps):
            done = stack.enter_context(in_thread(partial(upload, calls, order, blob, frames=tap, offset=number)))
            if before is not None:
                assert before.get(timeout=BOUND) == "superseded"
            tap.put(b"x")
            while plane.hub.uploads.received(order.message_id) == number:
                pass
            before = done
        assert upload(plane.calls("hospital-b"), other, blob).complete
        for tap in taps:
            tap.end()


def test_a_peer_that_drips_loses_its_place(start: Callable[..., Plane]):
    """A byte now and then, or byte after byte, is no progress."""
    plane = start(idle_seconds=0.2)
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    assert refused(lambda: upload(calls, order, bytes(FRAME_BYTES), frames=repeat(b"x"))) == "silent"


def test_who_announces_nothing_is_not_waited_for(start: Callable[..., Plane]):
    """An upload without a first frame ends."""
    plane = start(idle_seconds=0.05)
    with in_thread(lambda: plane.calls("hospital-a")._upload(iter(Tap([])))) as done:
        assert done.get() == "silent"


def test_a_party_has_so_many_calls_at_once(start: Callable[..., Plane]):
    """One more is refused; when one has ended there is room again. Other parties do not notice."""
    plane = start(calls_each=2)
    agent, order = plane.attach("hospital-a"), plane.order("hospital-a")
    tap = Tap([b"ab"])
    with in_thread(lambda: upload(agent.calls, order, b"ab", frames=tap)) as done:
        tap.let()
        while plane.hub.uploads.received(order.message_id) < 2:
            pass
        assert refused(lambda: agent.calls.upload_state(order.message_id)) == "busy"
        plane.attach("hospital-b")
        tap.end()
        assert done.get().complete
    assert agent.calls.upload_state(order.message_id).complete


def test_a_full_disk_refuses_an_upload_and_nothing_else(plane: Plane):
    """The partial file is removed, the peer is told to come back, and the next upload passes."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    part = plane.hub.blobs.parent / "uploads" / f"{order.message_id.hex()}.part"
    part.symlink_to("/dev/full")  # every write to it finds the disk full
    assert refused(lambda: upload(calls, order, b"x" * 5000)) == "disk-full"
    assert not part.is_symlink()
    assert calls.upload_state(order.message_id).received == 0
    assert upload(calls, order, b"x" * 5000).complete


def test_a_disk_that_fails_otherwise_is_a_fault_of_the_coordinator(plane: Plane):
    """The peer learns that it may try again, and nothing about the disk."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    part = plane.hub.blobs.parent / "uploads" / f"{order.message_id.hex()}.part"
    part.mkdir()
    assert refused(lambda: upload(calls, order, b"x")) == "failed"
    part.rmdir()
    assert upload(calls, order, b"x").complete


def test_a_blob_that_is_gone_ends_its_fetch(plane: Plane):
    """The order was closed while the site fetched."""
    order = plane.order("hospital-a", os.urandom(64 * FRAME_BYTES))
    stream = plane.calls("hospital-a").fetch(order.blob_digest)
    next(stream)
    order.blob.unlink()
    assert refused(lambda: stream) == "unknown-blob"


def test_an_agent_that_floods_is_held_back_and_heard(plane: Plane):
    """More events than a second takes wait in its own connection; all of them are answered in the end."""
    agent = plane.attach("hospital-a")
    for _ in range(450):
        agent.beat()
    for _ in range(450):
        agent.next("ping")
