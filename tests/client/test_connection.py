"""How a site comes back: not all sites in one instant, and not for ever where nobody answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent import make_agent
from client.connection import Backoff, Patience
from client.orders import Orders
from common.errors import FailureCode, UnreachableError
from common.transport import wire_pb2
from tests.helpers.agents import make_kits, resources_of
from tests.helpers.plane import running_plane


@given(st.floats(0.01, 10), st.floats(10, 1000), st.integers(0, 200))
def test_pauses_grow_up_to_a_bound(first, longest, attempts):
    """Twice as long at most each time, and each drawn anew between nothing and that."""
    backoff = Backoff(Patience(first_pause=first, longest_pause=longest))
    for attempt in range(attempts):
        assert 0 <= backoff.next() <= min(longest, first * 2**attempt)
    backoff.reset()
    assert backoff.next() <= first


def test_pauses_differ():
    """Two hundred sites that lose the coordinator together come back apart."""
    pauses = {Backoff(Patience()).next() for _ in range(200)}
    assert len(pauses) == 200


def test_what_only_a_person_can_mend_is_tried_slowly():
    """At about the longest pause from the start."""
    backoff = Backoff(Patience(longest_pause=60))
    assert all(30 <= backoff.next(slowly=True) <= 60 for _ in range(50))


def test_without_waiting_it_says_that_nobody_is_there(tmp_path):
    """Exit code 12."""
    kits = make_kits(tmp_path / "kits")
    with running_plane(kits, tmp_path / "hub") as plane:
        resources = resources_of(plane)
    with pytest.raises(UnreachableError, match="does not let this site in: unreachable") as caught:
        make_agent(resources, wait=False).run()
    assert caught.value.exit_code == 12


def test_a_coordinator_of_another_federation_is_none(tmp_path):
    """Its certificate comes from another root: the site says nothing to it."""
    kits, others = make_kits(tmp_path / "kits"), make_kits(tmp_path / "others")
    with running_plane(others, tmp_path / "hub") as plane:
        plane.kits = kits
        with pytest.raises(UnreachableError, match="tls-failed"):
            make_agent(resources_of(plane), wait=False).run()


class TestOrders:
    """The site's book of what it was asked."""

    @staticmethod
    def order(number: int, seconds: float = 0.0) -> wire_pb2.Order:
        return wire_pb2.Order(message_id=bytes([number] * 16), seconds_left=seconds)

    def test_an_order_is_handed_out_once(self):
        """However often it is entered, while it waits, is worked on, has failed or is over."""
        orders = Orders()
        assert orders.enter(self.order(1))
        assert not orders.enter(self.order(1))
        task = orders.next(lambda: False)
        assert not orders.enter(self.order(1))
        orders.fail(task, FailureCode.CLIENT_FAILED)
        orders.end(task)
        assert not orders.enter(self.order(1))
        orders.close(task.message_id)
        assert not orders.enter(self.order(1))
        assert orders.next(lambda: True) is None

    def test_an_order_whose_time_is_over_is_not_begun(self):
        """The one behind it is."""
        orders = Orders()
        orders.enter(self.order(1, seconds=1e-9))
        orders.enter(self.order(2))
        assert orders.next(lambda: False).message_id == bytes([2] * 16)
        assert orders.held() == [bytes([2] * 16)]

    def test_a_failure_of_an_order_that_was_cancelled_is_not_kept(self):
        """Nobody asks for it."""
        orders = Orders()
        orders.enter(self.order(1))
        task = orders.next(lambda: False)
        orders.close(task.message_id)
        assert task.cancelled
        assert not orders.fail(task, FailureCode.CLIENT_FAILED)
        orders.end(task)
        assert orders.held() == []

    def test_an_order_that_is_cancelled_while_it_waits_is_gone(self):
        """The worker never sees it."""
        orders = Orders()
        orders.enter(self.order(1))
        orders.close(bytes([1] * 16))
        assert orders.held() == []
