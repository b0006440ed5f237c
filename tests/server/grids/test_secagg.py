"""One round of secure aggregation over real members: any of them may vanish, or lie, at any trip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.aggregation import codec_for, covered
from common.config import RunConfig
from common.errors import FailureCode, PrivacyError
from common.flower import MASKED, SETUP_STEP
from common.secagg.fixed_point import FixedPoint
from server.grids import FoldingGrid
from server.grids.secagg import SecAggGrid
from server.job import RoundRecord
from server.secagg.set_up import SetUp
from tests.helpers.masked import (
    FORGET,
    VANISH,
    Fault,
    Faults,
    Members,
    answering,
    coordinate,
    garbled,
    masked,
    stepping,
)
from tests.helpers.releasing import start
from tests.helpers.runs import Log

CONFIG = masked(rounds=2)
ABORTED = FailureCode.AGGREGATION_ABORTED.slug
INVALID = FailureCode.INVALID_REPLY.slug
LATE = FailureCode.DEADLINE_EXCEEDED.slug


def at(names: Sequence[str], leg: str, fault: Fault, *, server_round: int = 1) -> Faults:
    """These clients have this fault at one leg of one round."""
    return lambda name, kind, now: fault if (kind, now) == (leg, server_round) and name in names else None


def ran(config: RunConfig = CONFIG, *, clients: int = 5, **options: object) -> tuple[list[RoundRecord], Members, Log]:
    """A run; its records, its clients and what was told."""
    grid, log = Members(config, clients, **options), Log()  # type: ignore[arg-type]
    coordinate(config, grid, observer=log)
    return log.records, grid, log


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(values, np.float64).reshape(-1) for values in arrays.values()])


def bound(config: RunConfig, survivors: int, weight: float, *, asked: int) -> float:
    """How far the mean of a sum may be from exact arithmetic, with the rounding of the model to float32."""
    codec = codec_for(config, covered(start()), participants=asked, plan=None, server_round=1)
    assert isinstance(codec, FixedPoint)
    return codec.bound(survivors, weight) + 2**-20


class TestSum:
    @settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_is_exact_for_any_admissible_drops(self, data: st.DataObject) -> None:
        """Whoever vanishes at whichever trip: while enough members are left, the model moves by the exact weighted mean
        of those whose updates arrived, up to the codec's bound.
        """
        config = masked(rounds=1, strategy={"weighting": "examples"}, secagg={"most_weight": 100})
        names = [f"site-{i:02d}" for i in range(6)]
        trips = [data.draw(st.sets(st.sampled_from(names), max_size=2)) for _ in range(3)]
        gone = dict(zip(("train", "agree", "unmask"), trips, strict=True))
        faults: Faults = lambda name, kind, _: VANISH if name in gone.get(kind, ()) else None  # noqa: E731
        weight = {name: float(data.draw(st.integers(1, 100))) for name in names}
        signers = set(names) - trips[0] - trips[1]
        holders = signers - trips[2]
        grid, log = Members(config, 6, faults=faults, weight=weight.get), Log()  # type: ignore[arg-type]
        if len(signers) < 4 or any(len(holders - {name}) < 2 for name in names):
            with pytest.raises(Exception, match="no client sent an update"):
                coordinate(config, grid, observer=log)
            return
        outcome = coordinate(config, grid, observer=log)
        survivors = [name for name in names if name not in trips[0]]
        assert log.records[0].survivors == survivors
        total = sum(weight[name] for name in survivors)
        mean = sum(weight[name] * grid.updates[name] for name in survivors) / total
        moved = flat(outcome.arrays) - flat(start())  # type: ignore[arg-type]
        whole = np.asarray([values.dtype.kind == "f" for values in start().values() for _ in range(values.size)])
        assert np.abs(moved[whole] - mean).max() <= bound(config, len(survivors), total, asked=6)
        assert not moved[~whole].any(), "a counter stays as it was"

    @pytest.mark.parametrize("leg", ["train", "agree", "unmask"])
    @pytest.mark.parametrize("gone", [[], ["site-00"], ["site-04"], ["site-01", "site-02"]])
    def test_fates_are_told_once(self, leg: str, gone: list[str]) -> None:
        """Every member of a cohort has one fate a round: who is in the opened sum none, whatever it did afterwards."""
        _, grid, log = ran(faults=at(gone, leg, VANISH), clients=6)
        first = log.fates[:6]
        lost = set(gone) if leg == "train" else set()
        assert sorted(name for name, _ in first) == grid.names
        assert {name for name, fate in first if fate is not None} == lost
        assert {fate for _, fate in first} <= {None, FailureCode.DEADLINE_EXCEEDED}

    def test_below_the_threshold_nothing_is_opened(self) -> None:
        """Too few survivors, statements or shares: the round aborts with a typed reason, and the next one works."""
        for leg, left in (("train", 2), ("agree", 3), ("unmask", 1)):
            gone = [f"site-{i:02d}" for i in range(5 - left)]
            records, grid, _ = ran(faults=at(gone, leg, VANISH))
            assert records[0].survivors == []
            assert set(records[0].failures.values()) == ({LATE, ABORTED} if leg == "train" else {ABORTED})
            assert records[1].survivors == grid.names
            assert records[0].aggregation is not None
            assert records[0].aggregation.groups[0].survivors == 0
            assert records[0].aggregation.groups[0].refused == {"train": "survivors", "agree": "quorum"}.get(
                leg, "shares"
            )

    def test_asks_once_more_who_was_away_for_a_moment(self) -> None:
        """A member that misses a trip is asked for the same again, where the sum needs it."""
        missed: set[tuple[str, str]] = set()

        def faults(name: str, kind: str, _: int) -> Fault | None:
            if kind in {"agree", "unmask"} and (name, kind) not in missed:
                missed.add((name, kind))
                return VANISH
            return None

        records, grid, _ = ran(faults=faults)
        assert records[0].survivors == grid.names

    def test_nobody_is_asked_again_without_need(self) -> None:
        """Where a quorum agreed and shares suffice, those that are missing are not waited for a second time."""
        _, grid, _ = ran(masked(rounds=1), clients=6, faults=at(["site-00"], "agree", VANISH))
        assert [kind for kind, _, name in grid.kinds if name == "site-00"].count("agree") == 1


class TestLies:
    """What a client sends is its own failure, and nobody else's."""

    @pytest.mark.parametrize(
        "fault",
        [
            answering(masked=np.zeros(7, np.uint8)),
            answering(masked=np.zeros(0, np.uint8)),
            answering(masked=np.zeros((64, 1), np.uint8)),
            answering(masked=np.zeros(16, np.uint32)),
            answering(masked=np.zeros(64, np.int8)),
            answering(other=np.zeros(64, np.uint8)),
            answering(masked=np.zeros(64, np.uint8), other=np.zeros(1)),
            answering(),
            garbled,
        ],
        ids=["short", "empty", "shape", "words", "signed", "name", "more", "none", "garbled"],
    )
    def test_no_masked_update(self, fault: Fault) -> None:
        """Wrong lengths, shapes, types and names, and bytes that cannot be read, are that client's invalid reply."""
        records, _, _ = ran(faults=at(["site-01"], "train", fault))
        assert records[0].failures == {"site-01": INVALID}
        assert len(records[0].survivors) == 4

    @pytest.mark.parametrize("leg", ["agree", "unmask"])
    @pytest.mark.parametrize("data", [b"", b"\0" * 40, b"\x0d\x01" + bytes(90), b"\x0f\x01" + bytes(90)])
    def test_no_step(self, leg: str, data: bytes) -> None:
        """Statements and shares that are none count as not sent."""
        records, grid, _ = ran(faults=at(["site-01"], leg, stepping(data)))
        assert records[0].survivors == grid.names

    @pytest.mark.parametrize("leg", ["advertise", "exchange", "deposit", "inbox"])
    @pytest.mark.parametrize("data", [b"", b"\x02\x01" + bytes(2000), b"\x09\x01" + bytes(500)])
    def test_no_set_up(self, leg: str, data: bytes) -> None:
        """Who answers a set-up with nonsense is not in the epoch, and the others are."""
        records, _, _ = ran(faults=at(["site-01"], leg, stepping(data, SETUP_STEP)))
        assert records[0].failures == {"site-01": INVALID}
        assert records[1].failures == {"site-01": FailureCode.NOT_IN_EPOCH.slug}

    def test_two_answers(self) -> None:
        """Who answers twice is heard once."""
        grid, log = Members(CONFIG), Log()
        right = grid._answer

        def twice(messages: list[Message]):  # type: ignore[no-untyped-def]
            for reply in right(messages):
                yield reply
                yield reply

        grid._engine._answer = twice  # type: ignore[attr-defined]
        coordinate(CONFIG, grid, observer=log)
        assert log.failures == [{}, {}]

    def test_refusals_keep_their_codes(self) -> None:
        """A member that refuses, failed or was restarted is on record as that."""
        faults: dict[str, Fault] = {
            "site-00": FailureCode.AGGREGATION_REFUSED,
            "site-01": FailureCode.CLIENT_FAILED,
            "site-02": FORGET,
        }
        records, _, _ = ran(clients=8, faults=lambda n, k, r: faults.get(n) if (k, r) == ("train", 1) else None)
        assert records[0].failures == {
            "site-00": "aggregation-refused",
            "site-01": "client-failed",
            "site-02": "not-in-epoch",
        }


def test_shows_no_single_reply() -> None:
    """Replies that are pulled one by one would be masked ones: that way is closed."""
    grid = SecAggGrid(
        Members(CONFIG),
        sums=[],
        nodes={},
        record=None,  # type: ignore[arg-type]
        tell=lambda *_: None,
        keep=lambda: None,
        reply=lambda *_: None,  # type: ignore[arg-type,return-value]
        riding=SetUp.nothing(),
    )
    for use in (grid.push_messages, grid.pull_messages):
        with pytest.raises(PrivacyError, match="secure aggregation"):
            use([])
    assert list(FoldingGrid(grid).stream([])) == []


def test_every_pair_of_drops_over_two_trips() -> None:
    """Wherever two of seven members vanish, at any two trips: the sum of the others' updates is opened."""
    for first, second in combinations((0, 3, 6), 2):
        for legs in (("train", "agree"), ("train", "unmask"), ("agree", "unmask")):
            gone = dict(zip((f"site-{first:02d}", f"site-{second:02d}"), legs, strict=True))
            records, grid, _ = ran(
                masked(rounds=1),
                clients=7,
                faults=lambda name, kind, _, gone=gone: VANISH if gone.get(name) == kind else None,
            )
            lost = [name for name, leg in gone.items() if leg == "train"]
            assert records[0].survivors == [name for name in grid.names if name not in lost]


assert MASKED == "masked"
