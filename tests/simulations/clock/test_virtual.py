"""The clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RunError
from server.job import ClockRecord
from simulations.clock import VirtualClock
from simulations.clock.virtual import Launch


def test_it_begins_at_zero_and_never_goes_back():
    """A moment that is over changes nothing."""
    clock = VirtualClock()
    moments = [clock.now]
    for to in (5.0, 3.0, 5.0, 7.5):
        clock.advance(to)
        moments.append(clock.now)
    assert moments == [0, 5, 5, 5, 7.5]


def test_a_lap_tells_of_what_happened_since_the_last():
    """The moment goes on, work and waste begin anew."""
    clock = VirtualClock()
    clock.advance(10)
    clock.worked(4, wasted=False)
    clock.worked(3, wasted=True)
    clock.wasted(4)
    assert clock.lap() == ClockRecord(at_seconds=10, work_seconds=7, wasted_seconds=7)
    assert clock.lap() == ClockRecord(at_seconds=10, work_seconds=0, wasted_seconds=0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6)).flatmap(lambda seconds: st.tuples(st.just(seconds), st.permutations(seconds))))
def test_the_order_in_which_work_is_noted_does_not_matter(orders: tuple[list[float], list[float]]) -> None:
    """Equal to the bit: replies come in the order in which workers happen to be done."""
    records = []
    for order in orders:
        clock = VirtualClock()
        for seconds in order:
            clock.worked(seconds, wasted=seconds > 10)
        records.append(clock.lap())
    assert records[0] == records[1]


@settings(deadline=None)
@given(st.floats(0, 1e12), st.dictionaries(st.tuples(st.text(max_size=4), st.integers(1, 9)), st.floats(0, 1e12)))
def test_its_state_is_json_and_brings_back_the_moment_to_the_bit(
    now: float, launches: dict[tuple[str, int], float]
) -> None:
    """With who is at work, in the same order."""
    clock, again = VirtualClock(), VirtualClock()
    clock.advance(now)
    clock.launches |= {order: Launch(at=at, ends=at + 5) for order, at in launches.items()}
    again.restore(json.loads(json.dumps(clock.state())))
    assert again.now == clock.now
    assert list(again.launches.items()) == list(clock.launches.items())
    assert again.state() == clock.state()


@pytest.mark.parametrize(
    "state", [{}, {"now": 1.0}, {"now": "x", "launches": []}, {"now": 1.0, "launches": [["c", 1, 2]]}]
)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    """And the clock stays as it was."""
    clock = VirtualClock()
    clock.advance(3)
    with pytest.raises(RunError, match="damaged"):
        clock.restore(state)
    assert clock.now == 3


def test_who_is_asked_again_after_the_run_was_left_began_before():
    """Who is not asked again was given up when the run went on: its work until then, or until its end, is wasted."""
    clock = VirtualClock()
    launches = [["a", 1, 2.0, 30.0], ["b", 1, 3.0, 9.0], ["c", 2, 4.0, 30.0]]
    clock.restore({"now": 10.0, "launches": launches})
    assert clock.launched(("a", 1)) == 2
    assert clock.launched(("a", 2)) == clock.launched(("d", 1)) == 10
    clock.advance(20)
    assert clock.lap() == ClockRecord(at_seconds=20, work_seconds=(9 - 3) + (10 - 4), wasted_seconds=12)
    assert list(clock.launches) == [("a", 1)]
    assert clock.lap().work_seconds == 0
