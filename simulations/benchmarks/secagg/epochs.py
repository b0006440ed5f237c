"""Set-up, rounds and unmasking through the real members and coordinator, in one process.

All seconds are process CPU time on one core; of members it is the mean over those that are measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from simulations.benchmarks.secagg.crowd import EPOCH_ROUNDS, Crowd

MILLION, COMPLETE, CROWD = 1_000_000, 100, 1_000
QUICK_CROWD = 200
_SAMPLE = 20


def of_a_hundred(*, rounds: int, count: int = COMPLETE, values: int = MILLION) -> dict[str, float]:
    """A complete graph, one colluder assumed, a tenth dropped after set-up; set-up ends when shares were received."""
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        crowd = Crowd(Path(temporary), count=count, colluding=1, values=values)
        group = crowd.set_up()
        unmasking = []
        for server_round in range(1, rounds + 1):
            before = crowd.seconds["unmasking"]
            crowd.round(group, server_round=server_round, dropped=set(group.names[5::10]))
            unmasking.append(crowd.seconds["unmasking"] - before)
            if server_round == 1:  # its requests brought the shares
                seconds = crowd.seconds["set-up"] + crowd.seconds["begin"]
                received = crowd.received["set-up"] + crowd.received["begin"]
    return {
        "unmask_100x1m_seconds": median(unmasking),
        "setup_100_seconds": seconds / count,
        "setup_100_kb": crowd.sent["set-up"] / count / 1000,
        "setup_100_received_kb": received / count / 1000,
    }


def of_a_crowd(*, count: int = CROWD, values: int = 100_000) -> dict[str, float]:
    """A ring, a twentieth assumed to collude and a twentieth dropped: a member's round, and its share of the set-up."""
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        crowd = Crowd(Path(temporary), count=count, colluding=count // 20, values=values, every=count // _SAMPLE)
        group = crowd.set_up()
        crowd.round(group, server_round=1, dropped=set(group.names[1::20]))
        members, setup = len(crowd.measured), crowd.seconds["set-up"]
        own = sum(crowd.seconds[what] for what in ("begin", "encode", "mask", "agree", "unmask"))
    return {
        f"client_{count}x100k_seconds": (own + setup / EPOCH_ROUNDS) / members,
        f"client_{count}x100k_setup_seconds": setup / members,
    }
