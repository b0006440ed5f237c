"""Models down and updates up: whatever happens on the way, the bytes that arrive are those that were sent."""

from __future__ import annotations

import os
import secrets
import tracemalloc
from collections.abc import Callable

import pytest

from common.transport import wire, wire_pb2
from common.transport.channel import PlaneCalls
from common.transport.wire import FRAME_BYTES
from server.plane.orders import Answer
from tests.helpers.plane import Plane, Tap, cut, in_thread, refused, upload

BLOB = os.urandom(3 * FRAME_BYTES + 12345)
FRAMES = len(cut(BLOB))


def _answer(plane: Plane) -> bytes:
    """The bytes of the next result, which must be an update."""
    result = plane.result()
    assert isinstance(result, Answer)
    assert result.size == result.path.stat().st_size
    return result.path.read_bytes()


def test_a_blob_is_fetched_in_frames(plane: Plane):
    """Full frames and a rest."""
    order = plane.order("hospital-a", BLOB)
    frames = list(plane.calls("hospital-a").fetch(order.blob_digest))
    assert [len(frame) for frame in frames] == [FRAME_BYTES] * 3 + [12345]
    assert b"".join(frames) == BLOB


@pytest.mark.parametrize("frames", range(FRAMES))
def test_a_fetch_continues_where_it_was_cut(plane: Plane, frames: int):
    """After any frame, from any byte."""
    order = plane.order("hospital-a", BLOB)
    stream = plane.calls("hospital-a").fetch(order.blob_digest)
    got = b"".join(next(stream) for _ in range(frames))
    stream.cancel()
    for at in (len(got), max(0, len(got) - 7)):
        rest = b"".join(plane.calls("hospital-a").fetch(order.blob_digest, offset=at))
        assert got[:at] + rest == BLOB


def test_a_fetch_from_the_end_is_empty_and_from_beyond_is_refused(plane: Plane):
    """There is nothing to guess about."""
    order, calls = plane.order("hospital-a", BLOB), plane.calls("hospital-a")
    assert list(calls.fetch(order.blob_digest, offset=len(BLOB))) == []
    assert refused(lambda: calls.fetch(order.blob_digest, offset=len(BLOB) + 1)) == "wrong-offset"


def test_only_recipients_of_an_open_order_can_fetch(plane: Plane):
    """Another site's blob, an unknown one, and one whose order is closed sound the same."""
    order = plane.order("hospital-a", BLOB)
    assert refused(lambda: plane.calls("hospital-b").fetch(order.blob_digest)) == "unknown-blob"
    calls = plane.calls("hospital-a")
    assert refused(lambda: calls.fetch(secrets.token_bytes(32))) == "unknown-blob"
    assert refused(lambda: calls.fetch(b"")) == "unknown-blob"
    plane.hub.cancel(order.message_id)
    assert refused(lambda: calls.fetch(order.blob_digest)) == "unknown-blob"


def test_an_update_comes_whole_and_has_its_receipt(plane: Plane):
    """The answer names its order, its site and the envelope that was announced."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a")
    agent.next("order")
    status = upload(agent.calls, order, BLOB, envelope=b"sealed for the coordinator")
    assert (status.complete, status.received) == (True, len(BLOB))
    assert agent.next("receipt").message_id == order.message_id
    result = plane.result()
    assert isinstance(result, Answer)
    assert (result.message_id, result.site) == (order.message_id, "hospital-a")
    assert result.envelope == b"sealed for the coordinator"
    assert result.path.read_bytes() == BLOB


@pytest.mark.parametrize("frames", range(FRAMES))
def test_an_upload_continues_where_it_was_cut(plane: Plane, frames: int):
    """After any frame: what is there is told, and needs not be sent again."""
    order, calls, tap = plane.order("hospital-a"), plane.calls("hospital-a"), Tap(cut(BLOB))
    tap.let(frames)
    tap.end()
    status = upload(calls, order, BLOB, frames=tap)
    assert (status.complete, status.received) == (False, frames * FRAME_BYTES)
    there = plane.calls("hospital-a").upload_state(order.message_id)
    assert (there.complete, there.received) == (False, frames * FRAME_BYTES)
    assert upload(calls, order, BLOB, offset=there.received).complete
    assert _answer(plane) == BLOB


def test_an_upload_survives_a_broken_connection(plane: Plane):
    """Not ended but cut off: the frames that came are kept."""
    order, first, tap = plane.order("hospital-a"), plane.channel("hospital-a"), Tap(cut(BLOB))
    with in_thread(lambda: upload(PlaneCalls(first), order, BLOB, frames=tap)) as done:
        tap.let(2)
        other = plane.calls("hospital-a")
        while other.upload_state(order.message_id).received < 2 * FRAME_BYTES:
            pass
        first.close()
        assert isinstance(done.get(), str | ValueError)
        tap.end()
    assert upload(other, order, BLOB, offset=2 * FRAME_BYTES).complete
    assert _answer(plane) == BLOB


def test_a_newer_stream_of_the_same_upload_supersedes_the_older(plane: Plane):
    """An agent that came back need not wait until its half-open stream is noticed."""
    order, calls, tap = plane.order("hospital-a"), plane.calls("hospital-a"), Tap(cut(BLOB))
    with in_thread(lambda: upload(calls, order, BLOB, frames=tap)) as done:
        tap.let(1)
        while calls.upload_state(order.message_id).received < FRAME_BYTES:
            pass
        assert upload(calls, order, BLOB, offset=FRAME_BYTES).complete
        tap.let(1)
        assert done.get() in {"superseded", "unknown-order"}
        tap.end()
    assert _answer(plane) == BLOB


@pytest.mark.parametrize("offset", [1, FRAME_BYTES - 1, FRAME_BYTES + 1, 2 * FRAME_BYTES, len(BLOB)])
def test_an_offset_that_is_not_what_is_there_is_refused(plane: Plane, offset: int):
    """Nothing is overwritten, and no gap is left; the upload can still be continued."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    upload(calls, order, BLOB, frames=cut(BLOB)[:1])
    assert refused(lambda: upload(calls, order, BLOB, offset=offset)) == "wrong-offset"
    assert refused(lambda: upload(calls, order, BLOB)) == "wrong-offset"
    assert upload(calls, order, BLOB, offset=FRAME_BYTES).complete
    assert _answer(plane) == BLOB


def test_an_upload_continues_only_under_the_envelope_it_began_with(plane: Plane):
    """Two sealings must not be mixed; with offset 0, the newer one starts anew."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    upload(calls, order, BLOB, frames=cut(BLOB)[:2])
    again = {"offset": 2 * FRAME_BYTES}
    assert refused(lambda: upload(calls, order, BLOB, envelope=b"other", **again)) == "other-update"
    assert refused(lambda: upload(calls, order, BLOB, blob_bytes=len(BLOB) + 1, **again)) == "other-update"
    other = os.urandom(len(BLOB))
    assert upload(calls, order, other, envelope=b"other").complete
    assert _answer(plane) == other


def test_a_repeated_upload_is_answered_at_once(plane: Plane):
    """Its first answer may have been lost: it is complete, nothing is read, and there is one result."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    assert upload(calls, order, BLOB).complete
    for blob, envelope in ((BLOB, b"envelope"), (b"other", b"forged")):
        status = upload(calls, order, blob, envelope=envelope)
        assert (status.complete, status.received) == (True, len(BLOB))
    assert calls.upload_state(order.message_id).complete
    assert _answer(plane) == BLOB
    assert plane.results.empty()


def test_more_than_an_answer_may_have_is_refused_unread(plane: Plane):
    """The order bounds its answer."""
    order, calls = plane.order("hospital-a", most_bytes=1000), plane.calls("hospital-a")
    assert refused(lambda: upload(calls, order, b"x" * 1001)) == "too-large"
    assert refused(lambda: upload(calls, order, b"x", blob_bytes=2**63)) == "too-large"
    assert upload(calls, order, b"x" * 1000).complete


def test_more_than_was_announced_is_refused_and_forgotten(plane: Plane):
    """Within a frame, or as another frame after the last."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    for frames in ([BLOB[:101]], [BLOB[:100], b"x"], [BLOB[:50], BLOB[:51]]):
        assert refused(lambda frames=frames: upload(calls, order, BLOB[:100], frames=frames)) == "too-large"
        assert calls.upload_state(order.message_id).received == 0
    assert plane.results.empty()
    assert not list((plane.hub.blobs.parent / "uploads").iterdir())


def test_frames_that_are_empty_or_too_long_are_refused(plane: Plane):
    """An empty frame would be work for nothing, a long one memory."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    for frame in (b"", bytes(FRAME_BYTES + 1)):
        assert refused(lambda frame=frame: upload(calls, order, BLOB, frames=[frame])) == "malformed"


def test_reordered_frames_are_stored_as_they_come(plane: Plane):
    """The transport promises the sender's bytes in the sender's order; their order is the container's to verify."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    frames = cut(BLOB)[1::-1]
    assert upload(calls, order, b"".join(frames), frames=frames).complete
    assert _answer(plane) == b"".join(frames)


def test_an_order_that_is_not_ones_own_cannot_be_answered(plane: Plane):
    """Another site's order, a cancelled one and one that never was are the same: unknown."""
    order, mallory = plane.order("hospital-a"), plane.calls("hospital-b")
    assert refused(lambda: upload(mallory, order, b"x")) == "unknown-order"
    assert refused(lambda: mallory.upload_state(order.message_id)) == "unknown-order"
    assert refused(lambda: mallory.upload_state(secrets.token_bytes(16))) == "unknown-order"
    assert refused(lambda: mallory.upload_state(b"")) == "unknown-order"
    upload(plane.calls("hospital-a"), order, BLOB)
    assert refused(lambda: mallory.upload_state(order.message_id)) == "unknown-order"
    assert _answer(plane) == BLOB
    assert "late" not in plane.seen.kinds()


def test_a_late_update_is_recorded_once_and_dropped(plane: Plane):
    """Its sender hears that nobody waits, and forgets it; the run is told whose it was."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    upload(calls, order, BLOB, frames=cut(BLOB)[:1])
    plane.hub.cancel(order.message_id)
    assert not list((plane.hub.blobs.parent / "uploads").iterdir())
    for _ in range(2):
        assert refused(lambda: upload(calls, order, BLOB)) == "unknown-order"
    assert plane.late.get() == ("hospital-a", order.message_id)
    assert plane.late.empty()
    assert plane.seen.kinds().count("late") == 1


def test_an_order_that_is_cancelled_ends_its_upload(plane: Plane):
    """At the next frame; nothing stays on the disk."""
    order, calls, tap = plane.order("hospital-a"), plane.calls("hospital-a"), Tap(cut(BLOB))
    with in_thread(lambda: upload(calls, order, BLOB, frames=tap)) as done:
        tap.let(1)
        while calls.upload_state(order.message_id).received < FRAME_BYTES:
            pass
        plane.hub.cancel(order.message_id)
        tap.let(1)
        assert done.get() == "unknown-order"
        tap.end()
    assert not list((plane.hub.blobs.parent / "uploads").iterdir())


def test_an_update_after_the_deadline_does_not_count(start: Callable[..., Plane]):
    """The run decided at its deadline who took part: what comes after it is late, however it is timed."""
    plane = start()
    order, calls = plane.order("hospital-a", deadline=0.0), plane.calls("hospital-a")
    assert refused(lambda: upload(calls, order, BLOB)) == "unknown-order"
    assert plane.result().failure.slug == "deadline-exceeded"
    assert plane.late.get() == ("hospital-a", order.message_id)
    assert not list((plane.hub.blobs.parent / "uploads").iterdir())


def test_an_announcement_that_makes_no_sense_is_malformed(plane: Plane):
    """Nothing to send, an offset beyond the end, an envelope that is none."""
    order, calls = plane.order("hospital-a"), plane.calls("hospital-a")
    for changes in (
        {"blob_bytes": 0},
        {"offset": len(BLOB) + 1, "blob_bytes": len(BLOB)},
        {"envelope": b""},
        {"envelope": bytes(wire.MOST_ENVELOPE_BYTES + 1)},
        {"message_id": b"short"},
    ):
        facts = {"message_id": order.message_id, "envelope": b"e", "blob_bytes": len(BLOB)} | changes
        start = wire_pb2.UploadStart(**facts)
        assert refused(lambda start=start: calls.upload(start, [])) == "malformed"


def test_a_transfer_needs_the_memory_of_frames_not_of_what_it_carries(plane: Plane):
    """64 MiB go up and down, while Python's own peak, at both ends, stays far below."""
    calls, frame, size = plane.calls("hospital-a"), os.urandom(FRAME_BYTES), 64 * FRAME_BYTES
    order = plane.order("hospital-a", most_bytes=size)
    tracemalloc.start()
    try:
        assert upload(calls, order, b"", blob_bytes=size, frames=(frame for _ in range(64))).complete
        result = plane.result()
        assert isinstance(result, Answer)
        down = plane.order("hospital-a", blob=result.path, blob_bytes=size, blob_digest=b"d" * 32)
        assert sum(map(len, calls.fetch(down.blob_digest))) == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 3
