"""How much of a peer that comes and goes is written down."""

from __future__ import annotations

from server.service.repeats import MOST, SECONDS, Repeats


def test_so_many_lines_of_each_peer_in_a_while() -> None:
    """Then none; after that time again, and the first says how many are missing. Others are not affected."""
    now = 0.0
    repeats = Repeats(clock=lambda: now)
    assert [repeats.left_out("a") for _ in range(MOST + 5)] == [0] * MOST + [None] * 5
    assert repeats.left_out("b") == 0
    now = SECONDS
    assert [repeats.left_out("a"), repeats.left_out("a"), repeats.left_out("b")] == [5, 0, 0]
