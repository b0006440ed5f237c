"""A run's way to the plane: on record before it happens, and nothing happens that cannot be recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from common.crypto import KINDS, NO_ID, Direction, Header, PartyKeys, seal
from common.errors import FailureCode, RunError
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Failed, Order, Result
from server.service.audit import AuditLog
from server.service.board import Board
from server.service.orders import RunOrders, Stop, StoppedError

RUN = "ab" * 16


class Recorded:
    """An audit log in memory; full from a given line on."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.full = False

    def record(self, event: str, **facts: Any) -> None:
        if self.full:
            raise RunError("full")
        self.lines.append({"event": event, **facts})

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


class Sent:
    """A hub that keeps what it is given."""

    def __init__(self, audit: Recorded) -> None:
        self.audit = audit
        self.orders: list[tuple[Order, Delivery]] = []
        self.cancelled: list[bytes] = []

    def send(self, order: Order, delivery: Delivery) -> None:
        assert "asked" in self.audit.events, "it is on record first"
        self.orders.append((order, delivery))

    def cancel(self, message_id: bytes) -> None:
        self.cancelled.append(message_id)


@pytest.fixture
def audit() -> Recorded:
    return Recorded()


@pytest.fixture
def hub(audit: Recorded) -> Sent:
    return Sent(audit)


@pytest.fixture
def orders(audit: Recorded, hub: Sent) -> RunOrders:
    return RunOrders(cast("Hub", hub), run_id=RUN, audit=cast("AuditLog", audit), board=Board())


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    """A real sealed order to one site."""
    server, site = PartyKeys.generate("server", "coordinator"), PartyKeys.generate("north", "site")
    header = Header(
        direction=Direction.DOWN, kind=KINDS["train"], run_id=bytes.fromhex(RUN), server_round=7, attempt=0,
        sender=server.record.key_id, message_id=bytes(range(16)), reply_to=NO_ID, plaintext_bytes=3,
        manifest=bytes(32), config_digest=bytes(32), cohort_digest=bytes(32), base_digest=bytes(32),
    )  # fmt: skip
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    with blob.open("wb") as sink:
        sealed = seal([b"abc"], header, sender=server, sink=sink, broadcast=True)
    return Order(
        message_id=header.message_id, site="north", kind="train", envelope=sealed.envelope_for(site.record), blob=blob,
        blob_digest=sealed.digest, blob_bytes=sealed.blob_bytes, most_bytes=1000,
    )  # fmt: skip


def test_an_order_says_what_is_asked_of_whom(orders: RunOrders, audit: Recorded, hub: Sent, order: Order) -> None:
    """Round, message and the digest of what is sent."""
    orders.send(order, Delivery(result=lambda _: None))
    (line,) = audit.lines
    facts = {"event": "asked", "run": RUN, "site": "north", "kind": "train", "round": 7}
    assert line == facts | {
        "message": bytes(range(16)).hex(), "blob": order.blob_digest.hex(), "bytes": order.blob_bytes
    }  # fmt: skip


def test_what_cannot_be_recorded_is_not_sent(orders: RunOrders, audit: Recorded, hub: Sent, order: Order) -> None:
    """A full disk stops the run before anything leaves."""
    audit.full = True
    with pytest.raises(RunError):
        orders.send(order, Delivery(result=lambda _: None))
    assert hub.orders == []


@pytest.mark.parametrize("failed", [False, True])
def test_a_result_is_on_record_before_the_run_has_it(
    orders: RunOrders, audit: Recorded, hub: Sent, order: Order, failed: bool
) -> None:
    """With size and the digest of its envelope, or why there is none."""
    known: list[list[str]] = []
    orders.send(order, Delivery(result=lambda _: known.append(audit.events)))
    answer: Result = (
        Failed(message_id=order.message_id, site="north", failure=FailureCode.POLICY_REFUSED)
        if failed
        else Answer(message_id=order.message_id, site="north", envelope=b"sealed", path=Path(), size=99)
    )
    hub.orders[0][1].result(answer)
    assert known == [["asked", "failed" if failed else "received"]]
    line = audit.lines[1]
    assert line.get("failure") == ("policy-refused" if failed else None)
    assert line.get("bytes") == (None if failed else 99)


def test_a_result_reaches_the_run_also_where_it_cannot_be_recorded(
    orders: RunOrders, audit: Recorded, hub: Sent, order: Order
) -> None:
    """The plane's thread must not stop over a full disk; the run itself fails at the round's end."""
    told: list[Result] = []
    orders.send(order, Delivery(result=told.append))
    audit.full = True
    hub.orders[0][1].result(Failed(message_id=order.message_id, site="north", failure=FailureCode.CLIENT_LOST))
    assert len(told) == 1


def test_what_comes_too_late_is_recorded_and_dropped(
    orders: RunOrders, audit: Recorded, hub: Sent, order: Order
) -> None:
    """After a deadline, or when enough had answered."""
    late: list[str] = []
    orders.send(order, Delivery(result=lambda _: None, late=lambda site, _id: late.append(site)))
    orders.cancel(order.message_id)
    hub.orders[0][1].late("north", order.message_id)
    assert audit.events == ["asked", "cancelled", "late"]
    assert (late, hub.cancelled) == (["north"], [order.message_id])


def test_an_operators_word_outlasts_the_services() -> None:
    """A run that both want to end does not go on after a restart."""
    stop = Stop()
    stop.check()
    for reason in ("service", "operator", "service"):
        stop.request(reason)  # type: ignore[arg-type]
        with pytest.raises(StoppedError):
            stop.check()
    assert stop.reason == "operator"
