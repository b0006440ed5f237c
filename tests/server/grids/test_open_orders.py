"""Orders that stay open between two questions for their answers, on a real plane with real keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.crypto import Header
from common.errors import FailureCode, RefusedError
from common.flower import arrays_of, failure_of
from server.grids.sealed import SealedGrid
from server.plane.orders import Delivery, Order
from tests.helpers.plane import BOUND, SITES, Plane, make_kits, running_plane
from tests.helpers.sealed_sites import SealedSite, messages_to, refusing, sealed_plane

MODEL = {"w": np.arange(40_000, dtype=np.float32), "b": np.ones(3, np.float32)}
OTHER = {"w": np.full(40_000, 5, np.float32), "b": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("open-orders") / "kits")


@pytest.fixture
def plane(kits: Path, tmp_path: Path) -> Iterator[Plane]:
    with running_plane(kits, tmp_path / "plane") as plane:
        yield plane


def next_of(grid: SealedGrid, ids: list[str]) -> Message:
    """The next reply; questions that bring none wait by themselves."""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        for reply in grid.pull_messages(ids):
            return reply
    raise AssertionError("no reply")


def files_of(plane: Plane) -> list[str]:
    """Ciphertext in both directions."""
    return [path.name for folder in ("uploads", "blobs") for path in (plane.hub.blobs.parent / folder).iterdir()]


def test_the_first_to_answer_is_the_first_to_be_pulled(plane: Plane) -> None:
    """A site that is slow holds up nobody, and its answer comes when it comes, to the order that it belongs to."""
    sites = {name: SealedSite(plane, name) for name in SITES}
    sites[SITES[0]].gate.clear()
    grid = sealed_plane(plane)
    first = grid.push_messages(messages_to(MODEL, *SITES))
    for _ in range(2):
        reply = next_of(grid, first)
        assert reply.metadata.reply_to_message_id in first[1:]
        np.testing.assert_array_equal(arrays_of(reply.content)["w"], 2 * MODEL["w"])
    second = grid.push_messages(messages_to(OTHER, SITES[1], server_round=2))
    reply = next_of(grid, first + second)
    assert reply.metadata.reply_to_message_id == second[0]
    np.testing.assert_array_equal(arrays_of(reply.content)["w"], 2 * OTHER["w"])
    sites[SITES[0]].gate.set()
    reply = next_of(grid, first)
    assert reply.metadata.reply_to_message_id == first[0]
    np.testing.assert_array_equal(arrays_of(reply.content)["w"], 2 * MODEL["w"])
    grid.cancel_messages([])
    assert files_of(plane) == []


def test_a_question_that_brings_nothing_returns_after_a_while(plane: Plane) -> None:
    """Orders stay open; `check` is asked meanwhile, and what it raises comes out."""

    class StoppedError(Exception):
        pass

    stop: list[Exception] = []

    def check() -> None:
        if stop:
            raise stop[0]

    site = SealedSite(plane, SITES[0])
    site.gate.clear()
    grid = sealed_plane(plane, check=check)
    ids = grid.push_messages(messages_to(MODEL, SITES[0]))
    assert site.began.wait(BOUND)
    assert grid.pull_messages(ids) == []
    assert grid.pull_messages(["ff" * 16]) == []
    stop.append(StoppedError())
    with pytest.raises(StoppedError):
        grid.pull_messages(ids)
    stop.clear()
    site.gate.set()
    assert next_of(grid, ids).has_content()


def test_who_is_late_fails_and_is_told_to_stop(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is each order's own; what came in time counts, however late it is pulled."""

    class Clock:
        ahead = 0.0

        def monotonic(self) -> float:
            return time.monotonic() + self.ahead

    late: list[str] = []
    clock = Clock()
    monkeypatch.setattr("server.grids.open_orders.time", clock)
    sites = {name: SealedSite(plane, name) for name in SITES[:2]}
    sites[SITES[0]].gate.clear()
    grid = sealed_plane(plane, on_late=late.append)
    timed = grid.push_messages(messages_to(MODEL, *SITES[:2]), timeout=BOUND)
    plane.seen.wait_for("answer-received", party=SITES[1])
    clock.ahead = BOUND
    assert next_of(grid, timed).has_content()
    assert failure_of(next_of(grid, timed)) is FailureCode.DEADLINE_EXCEEDED
    assert sites[SITES[0]].told.wait(BOUND)
    assert grid.pull_messages(timed) == []
    sites[SITES[0]].gate.set()
    plane.seen.wait_for("late")
    assert late == [SITES[0]]
    assert files_of(plane) == []


def test_what_is_cancelled_never_comes(plane: Plane) -> None:
    """Neither an order that a site works on, nor an answer that has arrived; its ciphertext goes."""
    sites = {name: SealedSite(plane, name) for name in SITES}
    sites[SITES[0]].gate.clear()
    grid = sealed_plane(plane)
    ids = grid.push_messages(messages_to(MODEL, *SITES))
    for name in SITES[1:]:
        plane.seen.wait_for("answer-received", party=name)
    grid.cancel_messages(ids[:2])
    assert sites[SITES[0]].told.wait(BOUND)
    assert next_of(grid, ids).metadata.reply_to_message_id == ids[2]
    assert grid.pull_messages(ids) == []
    grid.cancel_messages(ids)
    assert files_of(plane) == []
    assert not list(plane.hub.book.waiting())


def test_an_answer_that_was_seen_beside_others_goes_when_it_is_cancelled(plane: Plane) -> None:
    """It waited for somebody to ask for it; nobody does any more."""
    for name in SITES:
        SealedSite(plane, name)
    grid = sealed_plane(plane)
    ids = grid.push_messages(messages_to(MODEL, *SITES))
    for name in SITES:
        plane.seen.wait_for("answer-received", party=name)
    next_of(grid, ids[2:])
    grid.cancel_messages(ids[:2])
    assert files_of(plane) == []


def test_failures_pass_with_their_reason(plane: Plane) -> None:
    """A site that takes no part, one that is shut out, and one whose keys nobody knows."""
    SealedSite(plane, SITES[0], refusing)
    grid = sealed_plane(plane)
    grid._records = {name: record for name, record in grid._records.items() if name != SITES[2]}
    ids = grid.push_messages(messages_to(MODEL, *SITES))
    plane.hub.shut_out([SITES[1]])
    fates = {}
    for _ in SITES:
        reply = next_of(grid, ids)
        fates[reply.metadata.reply_to_message_id] = failure_of(reply)
    assert [fates[message_id] for message_id in ids] == [
        FailureCode.POLICY_REFUSED,
        FailureCode.CLIENT_LOST,
        FailureCode.CLIENT_LOST,
    ]


def test_only_the_answer_to_this_order_counts(plane: Plane) -> None:
    """A site that signs its answer for another order, model or round has failed: no update can look newer."""
    import client.mods.sealed as mod

    original, changes = mod.Header, {}

    def changed(**fields: Any) -> Header:
        return original(**fields | changes)

    for wrong in (
        {"reply_to": b"x" * 16},
        {"base_digest": b"x" * 32},
        {"server_round": 2},
        {"attempt": 9},
    ):
        site = SealedSite(plane, SITES[0])
        grid = sealed_plane(plane)
        changes.clear()
        changes.update(wrong)
        mod.Header = changed  # type: ignore[assignment,misc]
        try:
            reply = next_of(grid, grid.push_messages(messages_to(MODEL, SITES[0])))
        finally:
            mod.Header = original  # type: ignore[misc]
        assert failure_of(reply) is FailureCode.INVALID_REPLY, wrong
        site.agent.close()
        plane.seen.wait_for("detached", party=SITES[0])
        plane.seen.events.clear()


def test_nothing_that_is_not_sealed_is_sent(plane: Plane) -> None:
    """If one message is not sealed, none is sent."""
    grid = sealed_plane(plane)._inner
    with pytest.raises(RefusedError):
        grid.push_messages(messages_to(MODEL, SITES[0]))  # type: ignore[attr-defined]
    assert not list(plane.hub.book.waiting())


def test_a_send_that_fails_half_way_leaves_nothing_open(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an order cannot be recorded, those before it are cancelled."""
    sent: list[bytes] = []
    original = plane.hub.send

    def send(order: Order, delivery: Delivery) -> None:
        if sent:
            raise OSError("the log is full")
        sent.append(order.message_id)
        original(order, delivery)

    monkeypatch.setattr(plane.hub, "send", send)
    with pytest.raises(OSError, match="the log is full"):
        sealed_plane(plane).push_messages(messages_to(MODEL, *SITES))
    assert len(sent) == 1
    assert not list(plane.hub.book.waiting())
    assert files_of(plane) == []


def test_a_blob_in_memory_is_written_once_and_goes_with_the_last_order(plane: Plane) -> None:
    """For a grid above that has no folder."""
    sites = [SealedSite(plane, name) for name in SITES[:2]]
    sites[1].gate.clear()
    grid = sealed_plane(plane)
    grid._folder = None
    ids = grid.push_messages(messages_to(MODEL, *SITES[:2]))
    assert len(list(plane.hub.blobs.iterdir())) == 1
    next_of(grid, ids)
    assert len(list(plane.hub.blobs.iterdir())) == 1
    sites[1].gate.set()
    next_of(grid, ids)
    assert list(plane.hub.blobs.iterdir()) == []
