"""Orders and results without a network: exactly one result, whoever calls when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import FailureCode, RunError
from common.transport import wire_pb2
from common.transport.wire import Refusal
from server.plane import book
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Failed, Order, Result
from server.plane.refusals import RefusedCallError
from tests.helpers.plane import Observed

ID = b"m" * 16
HELLO = wire_pb2.Hello(protocol=1, instance=b"i" * 16)


class Stream:
    """What an agent's stream was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.closed: list[Refusal] = []

    def post(self, event: wire_pb2.ServerEvent) -> None:
        self.heard.append(str(event.WhichOneof("event")))

    def close(self, refusal: Refusal) -> None:
        self.closed.append(refusal)


class Bench:
    """A hub with a clock that stands still until a test moves it."""

    def __init__(self, folder: Path) -> None:
        self.now, self.seen = 1000.0, Observed()
        self.hub = Hub(folder, observe=self.seen, clock=lambda: self.now)
        self.results: list[Result] = []
        self.late: list[tuple[str, bytes]] = []

    def send(self, message_id: bytes = ID, site: str = "a", deadline: float | None = None) -> Order:
        order = Order(
            message_id=message_id, site=site, kind="train", envelope=b"e", blob=Path("blob"), blob_digest=b"d" * 32,
            blob_bytes=1, most_bytes=10, deadline=deadline,
        )  # fmt: skip
        self.hub.send(order, Delivery(result=self.results.append, late=lambda *what: self.late.append(what)))
        return order

    def answer(self, folder: Path, message_id: bytes = ID, site: str = "a") -> Answer:
        path = folder / f"{threading.get_ident()}-{message_id.hex()}"
        path.write_bytes(b"x")
        return Answer(message_id=message_id, site=site, envelope=b"e", path=path, size=1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "plane")
    yield made
    made.hub.close()


def test_one_process_uses_a_hubs_folder(tmp_path: Path):
    """A second coordinator on the same kit is stopped before it removes the first one's files."""
    first = Hub(tmp_path / "plane")
    (first.blobs / "in use").write_bytes(b"x")
    with pytest.raises(RunError, match="another process"):
        Hub(tmp_path / "plane")
    assert (first.blobs / "in use").exists()
    first.close()
    second = Hub(tmp_path / "plane")
    assert not list(second.blobs.iterdir())
    second.close()


def test_a_message_id_names_one_order(bench: Bench):
    """Also after it was closed: an update could otherwise answer another question than it was asked."""
    bench.send()
    with pytest.raises(ValueError, match="exists"):
        bench.send(site="b")
    bench.hub.cancel(ID)
    with pytest.raises(ValueError, match="exists"):
        bench.send()


def test_the_first_result_counts(bench: Bench, tmp_path: Path):
    """An update after a failure is dropped, with its file; a failure after an update changes nothing."""
    bench.send()
    bench.hub.failed("a", ID, FailureCode.CLIENT_FAILED)
    late = bench.answer(tmp_path)
    with pytest.raises(RefusedCallError):
        bench.hub.answered(late)
    assert not late.path.exists()
    bench.send(b"n" * 16)
    bench.hub.answered(bench.answer(tmp_path, b"n" * 16))
    bench.hub.failed("a", b"n" * 16, FailureCode.CLIENT_FAILED)
    assert [type(result) for result in bench.results] == [Failed, Answer]
    assert bench.late == []


def test_a_deadline_is_the_last_instant_that_counts(bench: Bench, tmp_path: Path):
    """At it: in time. After it: the order failed, and what came is late."""
    for number, (moment, expected) in enumerate([(1010.0, Answer), (1010.1, Failed)]):
        bench.now, message_id = 1000.0, bytes([number]) * 16
        bench.send(message_id, deadline=1010.0)
        bench.now = moment
        answer = bench.answer(tmp_path, message_id)
        if expected is Answer:
            bench.hub.answered(answer)
        else:
            with pytest.raises(RefusedCallError):
                bench.hub.answered(answer)
        assert isinstance(bench.results[-1], expected)
    assert bench.late == [("a", b"\1" * 16)]


def test_seconds_left_are_counted_when_an_order_is_sent(bench: Bench):
    """A site that attaches late has less time."""
    order = bench.send(deadline=1010.0)
    assert bench.hub.book.event(order).order.seconds_left == 10
    bench.now = 1008.0
    assert bench.hub.book.event(order).order.seconds_left == 2
    bench.now = 1020.0
    assert 0 < bench.hub.book.event(order).order.seconds_left < 0.01  # 0 would say that there is no deadline


def test_a_site_that_is_shut_out_is_lost_at_once(bench: Bench):
    """What is open fails, what comes later too, its stream ends, and it cannot attach; until it is let in again."""
    stream = Stream()
    bench.hub.attach("a", HELLO, stream)
    bench.send()
    bench.hub.shut_out(["a"])
    bench.send(b"n" * 16)
    assert [result.failure.slug for result in bench.results if isinstance(result, Failed)] == ["client-lost"] * 2
    assert stream.closed == [Refusal.DENIED]
    bench.hub.detach("a", stream)
    with pytest.raises(RefusedCallError):
        bench.hub.attach("a", HELLO, Stream())
    bench.hub.shut_out([])
    bench.hub.attach("a", HELLO, Stream())


def test_another_process_takes_a_silent_place_and_ends_the_stream_there(bench: Bench):
    """Three heartbeats, not less; then the older stream is told, and cannot detach the newer."""
    first, second = Stream(), Stream()
    bench.hub.attach("a", HELLO, first)
    other = wire_pb2.Hello(protocol=1, instance=b"j" * 16)
    bench.now += 60
    with pytest.raises(RefusedCallError) as refusal:
        bench.hub.attach("a", other, second)
    assert refusal.value.refusal is Refusal.ATTACHED_ELSEWHERE
    bench.now += 0.1
    bench.hub.attach("a", other, second)
    bench.hub.detach("a", first)
    assert first.closed == [Refusal.SUPERSEDED]
    assert list(bench.hub.attached()) == ["a"]


def test_an_observer_that_fails_changes_nothing(tmp_path: Path):
    """Its fault is logged: an order half closed would hang a round."""

    def broken(_event: Any) -> None:
        raise OSError("the audit log's disk is full")

    hub, results = Hub(tmp_path / "plane", observe=broken), []
    order = Order(
        message_id=ID, site="a", kind="train", envelope=b"e", blob=Path("blob"), blob_digest=b"d" * 32, blob_bytes=1,
        most_bytes=1,
    )  # fmt: skip
    hub.attach("a", HELLO, Stream())
    hub.send(order, Delivery(result=results.append))
    hub.failed("a", ID, FailureCode.CLIENT_FAILED)
    assert len(results) == 1
    hub.close()


def test_closed_orders_are_forgotten_in_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """The memory of them is bounded; what comes after that is unknown."""
    monkeypatch.setattr(book, "MOST_CLOSED", 3)
    for number in range(10):
        bench.send(bytes([number]) * 16)
        bench.hub.cancel(bytes([number]) * 16)
    bench.hub.failed("a", b"\0" * 16, FailureCode.CLIENT_FAILED)
    assert bench.late == []
    bench.hub.failed("a", b"\x09" * 16, FailureCode.CLIENT_FAILED)
    assert bench.late == [("a", b"\x09" * 16)]
    assert len(bench.hub.book._closed) == 3


@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["send", "cancel", "answer", "fail", "shut", "reopen"]),
            st.sampled_from(["a", "b"]),
            st.integers(0, 3),
        ),
        max_size=40,
    )
)
def test_whatever_happens_an_order_has_at_most_one_result(tmp_path_factory: pytest.TempPathFactory, moves):
    """And it is its own site's; every order is open, cancelled, or has its result."""
    folder = tmp_path_factory.mktemp("hub")
    bench = Bench(folder / "plane")
    owners: dict[bytes, str] = {}
    cancelled: set[bytes] = set()
    try:
        for move, site, number in moves:
            message_id = bytes([number]) * 16
            if move == "send" and message_id not in owners:
                owners[message_id] = site
                bench.send(message_id, site)
            elif move == "cancel":
                if message_id not in {result.message_id for result in bench.results}:
                    cancelled.add(message_id)
                bench.hub.cancel(message_id)
            elif move == "fail":
                bench.hub.failed(site, message_id, 1001)
            elif move == "answer":
                answer = bench.answer(folder, message_id, site)
                try:
                    bench.hub.answered(answer)
                except RefusedCallError:
                    assert not answer.path.exists()
            elif move in {"shut", "reopen"}:
                bench.hub.shut_out([site] if move == "shut" else [])
        answered = [result.message_id for result in bench.results]
        assert len(answered) == len(set(answered))
        assert all(owners[result.message_id] == result.site for result in bench.results)
        open_orders = {order.message_id for site in ("a", "b") for order in bench.hub.book.of_site(site)}
        assert open_orders.isdisjoint(answered)
        assert owners.keys() == open_orders | set(answered) | (cancelled & owners.keys())
    finally:
        bench.hub.close()


def test_results_from_many_threads_are_one_result(bench: Bench, tmp_path: Path):
    """Eight threads answer the same order at once; one of them is taken."""
    bench.send()
    together, refusals = threading.Barrier(8), []

    def answer() -> None:
        mine = bench.answer(tmp_path)
        together.wait()
        try:
            bench.hub.answered(mine)
        except RefusedCallError as e:
            refusals.append(e.refusal)

    threads = [threading.Thread(target=answer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bench.results) == 1
    assert refusals == [Refusal.UNKNOWN_ORDER] * 7
