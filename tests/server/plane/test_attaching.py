"""The control stream: who is attached, what an agent hears on it, and what ends it."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from common.errors import FailureCode
from common.transport import wire_pb2
from server.plane.orders import Failed
from tests.helpers.plane import BOUND, Agent, Plane, Tap, refused, upload


def test_an_agent_is_welcomed_and_known_until_it_leaves(plane: Plane):
    """A site is attached from its welcome to the end of its stream."""
    agent = plane.attach("hospital-a", version="9.9")
    facts = plane.hub.attached()["hospital-a"]
    assert (facts.site, facts.version, facts.state, facts.open_orders) == ("hospital-a", "9.9", "idle", 0)
    assert plane.hub.wait_attached(["hospital-a"], timeout=0)
    agent.leave()
    assert agent.end() == "ok"
    plane.seen.wait_for("detached", party="hospital-a")
    assert not plane.hub.attached()


def test_a_run_can_wait_until_its_sites_are_attached(plane: Plane):
    """`wait_attached` returns when all are there at once, or says that they are not."""
    plane.attach("hospital-a")
    assert not plane.hub.wait_attached(["hospital-a", "hospital-b"], timeout=0)
    plane.attach("hospital-b")
    assert plane.hub.wait_attached(["hospital-a", "hospital-b"], timeout=BOUND)


def test_heartbeats_tell_what_a_site_does_and_are_answered(plane: Plane):
    """Each heartbeat has a ping for answer, by which an agent knows that the coordinator lives."""
    agent = plane.attach("hospital-a")
    agent.beat("working", working_on=b"o" * 16)
    agent.next("ping")
    facts = plane.hub.attached()["hospital-a"]
    assert (facts.state, facts.working_on) == ("working", b"o" * 16)


def test_an_order_reaches_an_attached_site_as_it_was_sent(plane: Plane):
    """Message id, kind, envelope, digest and size arrive; without a deadline, no seconds are left to count."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a", kind="evaluate")
    heard = agent.next("order")
    assert (heard.message_id, heard.kind, heard.envelope) == (order.message_id, "evaluate", order.envelope)
    assert (heard.blob_digest, heard.blob_bytes, heard.seconds_left) == (order.blob_digest, order.blob_bytes, 0)


def test_an_order_waits_for_a_site_that_is_not_attached(plane: Plane):
    """It is sent on attachment, and again on every later one while the agent does not hold it."""
    order = plane.order("hospital-a")
    first = plane.attach("hospital-a")
    assert first.next("order").message_id == order.message_id
    first.close()
    plane.seen.wait_for("detached")
    assert plane.attach("hospital-a").next("order").message_id == order.message_id


def test_an_order_that_an_agent_holds_is_not_sent_again(plane: Plane):
    """After a broken link the agent goes on with what it has; only other orders are sent."""
    held, other = plane.order("hospital-a"), plane.order("hospital-a", b"another")
    agent = plane.attach("hospital-a", held=[held.message_id])
    assert agent.next("order").message_id == other.message_id
    agent.beat()
    agent.next("ping")


def test_a_held_order_that_nobody_waits_for_is_cancelled(plane: Plane):
    """A restarted coordinator knows nothing of former orders: agents that hold them are told to forget."""
    gone = secrets.token_bytes(16)
    agent = plane.attach("hospital-a", held=[gone])
    assert agent.next("cancel").message_id == gone


def test_a_held_order_that_was_answered_has_its_receipt_again(plane: Plane):
    """The receipt may have been lost with the link."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a")
    upload(agent.calls, order, b"update")
    agent.close()
    plane.seen.wait_for("detached")
    again = plane.attach("hospital-a", held=[order.message_id])
    assert again.next("receipt").message_id == order.message_id


def test_a_cancelled_order_is_cancelled_at_the_site(plane: Plane):
    """Nobody waits any more, and nothing is delivered."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a")
    agent.next("order")
    plane.hub.cancel(order.message_id)
    assert agent.next("cancel").message_id == order.message_id
    agent.fail(order.message_id, FailureCode.CLIENT_FAILED)
    assert agent.next("cancel").message_id == order.message_id
    assert plane.results.empty()


def test_a_failure_is_the_result_of_its_order(plane: Plane):
    """With its receipt, so that the agent can forget it; a second one changes nothing."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a")
    agent.next("order")
    for _ in range(2):
        agent.fail(order.message_id, FailureCode.POLICY_REFUSED)
        assert agent.next("receipt").message_id == order.message_id
    expected = Failed(message_id=order.message_id, site="hospital-a", failure=FailureCode.POLICY_REFUSED)
    assert plane.result() == expected
    assert plane.results.empty()


def test_an_unknown_failure_code_counts_as_a_failed_client(plane: Plane):
    """A newer agent, or a lying one, cannot make the coordinator stumble over a number."""
    agent = plane.attach("hospital-a")
    order = plane.order("hospital-a")
    agent.fail(order.message_id, 77)
    result = plane.result()
    assert isinstance(result, Failed)
    assert result.failure is FailureCode.CLIENT_FAILED


def test_another_sites_order_cannot_be_failed(plane: Plane):
    """It sounds as if there were no such order, and the order stays open."""
    mallory, owner = plane.attach("hospital-b"), plane.attach("hospital-a")
    order = plane.order("hospital-a")
    mallory.fail(order.message_id, FailureCode.CLIENT_FAILED)
    assert mallory.next("cancel").message_id == order.message_id
    assert plane.results.empty()
    owner.next("order")
    assert plane.hub.attached()["hospital-a"].open_orders == 1


def test_a_second_process_under_one_identity_is_refused_while_the_first_lives(plane: Plane):
    """The first stays; the second hears why."""
    first = plane.attach("hospital-a")
    second = Agent(plane.calls("hospital-a"))
    assert second.end() == "attached-elsewhere"
    first.beat()
    first.next("ping")
    plane.seen.wait_for("refused", party="hospital-a")


def test_the_same_process_replaces_its_own_stream(plane: Plane):
    """A cut link leaves a stream half open: its own process need not wait until that is noticed."""
    first = plane.attach("hospital-a")
    second = plane.attach("hospital-a", instance=first.instance)
    assert first.end() == "superseded"
    order = plane.order("hospital-a")
    assert second.next("order").message_id == order.message_id


def test_another_process_takes_over_from_one_that_fell_silent(start: Callable[..., Plane]):
    """Three heartbeats are missed: the stream ends, and the place is free."""
    plane = start(heartbeat_seconds=0.05)
    silent = plane.attach("hospital-a")
    assert silent.end() == "silent"
    plane.seen.wait_for("detached")
    plane.attach("hospital-a")


def test_who_says_nothing_at_first_is_not_waited_for(start: Callable[..., Plane]):
    """A stream without a first message ends."""
    plane = start(idle_seconds=0.05)
    assert refused(lambda: plane.calls("hospital-a").attach(iter(Tap([])))) == "silent"


def test_an_agent_of_another_version_is_told_so(plane: Plane):
    """Control messages of another version are not guessed at."""
    assert Agent(plane.calls("hospital-a"), protocol=2).end() == "protocol"


def test_what_no_agent_says_ends_its_stream(plane: Plane):
    """A second hello, an empty event, ids of a wrong length, an unknown state: each is malformed."""
    for event in (
        {"hello": wire_pb2.Hello(protocol=1, instance=b"i" * 16)},
        {},
        {"failure": wire_pb2.Failure(message_id=b"short")},
        {"heartbeat": wire_pb2.Heartbeat(state="conquering")},
        {"heartbeat": wire_pb2.Heartbeat(state="idle", working_on=b"short")},
    ):
        agent = plane.attach("hospital-a")
        agent.say(**event)
        assert agent.end() == "malformed"
        plane.seen.wait_for("detached", count=plane.seen.kinds().count("attached"))
    versions = [{"version": version} for version in ("", "v" * 41, "1\x1b[2J", "1\n", "é")]
    for hello in ({"instance": b"short"}, {"held": [b"short"]}, {"held": [b"i" * 16] * 1025}, *versions):
        assert Agent(plane.calls("hospital-a"), **hello).end() == "malformed"


def test_stopping_ends_open_streams_with_a_reason(plane: Plane):
    """Agents know that it is no refusal; nothing hangs."""
    agents = [plane.attach(site) for site in ("hospital-a", "hospital-b")]
    plane.server.stop()
    assert [agent.end() for agent in agents] == ["stopping", "stopping"]
    assert not plane.hub.attached()


def test_a_stopped_plane_can_be_followed_by_another(start: Callable[..., Plane]):
    """The folder is free again, and what lay in it is gone."""
    first = start()
    (first.hub.blobs / "left").write_bytes(b"x")
    first.server.stop()
    first.hub.close()
    second = start()
    assert not list(second.hub.blobs.iterdir())
    second.attach("hospital-a")
