"""Means, ranges and differences over repeats, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simulations.study.summary import Spread, difference
from tests.simulations.study.conftest import Make

PAIR = ["strategy.name=fedavg,fedprox"]


class TestDifference:
    def test_is_taken_repeat_by_repeat(self) -> None:
        """Two arms that move together from seed to seed differ clearly, though their ranges overlap."""
        found = difference(Spread(values=(0.61, 0.71, 0.82)), Spread(values=(0.60, 0.70, 0.80)))
        assert found.mean == pytest.approx(0.04 / 3)
        assert found.verdict == "no clear difference"
        assert difference(Spread(values=(0.61, 0.71, 0.81)), Spread(values=(0.60, 0.70, 0.80))).verdict == "higher"
        assert difference(Spread(values=(0.60, 0.70, 0.80)), Spread(values=(0.61, 0.71, 0.81))).verdict == "lower"

    @given(st.lists(st.floats(-1, 1), min_size=2, max_size=31))
    def test_has_students_interval(self, gaps: list[float]) -> None:
        """The half width that scipy's t distribution gives, for two to 31 repeats."""
        found = difference(Spread(values=tuple(gaps)), Spread(values=(0.0,) * len(gaps)))
        error = stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
        assert found.error == pytest.approx(error, rel=1e-3, abs=1e-12)

    def test_is_never_too_narrow_beyond_the_table(self) -> None:
        """With more repeats the last entry serves: a little wide."""
        gaps = tuple(float(i % 5) for i in range(60))
        found = difference(Spread(values=gaps), Spread(values=(0.0,) * 60))
        assert found.error is not None
        assert found.error >= stats.t.ppf(0.975, 59) * stats.sem(gaps)

    def test_of_one_repeat_says_nothing_of_chance(self) -> None:
        """There is a difference, and no interval."""
        found = difference(Spread(values=(0.9,)), Spread(values=(0.5,)))
        assert (found.error, found.verdict) == (None, "one repeat")


class TestArms:
    def test_have_mean_and_range_of_what_their_runs_ended_with(self, make: Make) -> None:
        """And the difference from the first arm, which has none."""
        _, _, summary = make(PAIR, [[[0.5, 0.8], [0.5, 0.7]], [[0.5, 0.9], [0.5, 0.8]]])
        first, second = summary.arms
        assert first.accuracy is not None
        assert (first.accuracy.mean, first.accuracy.low, first.accuracy.high) == (0.75, 0.7, 0.8)
        assert first.against_first is None
        assert second.against_first is not None
        assert second.against_first.mean == pytest.approx(0.1)

    def test_have_their_work_and_their_clients(self, make: Make) -> None:
        """Wasted share, virtual time, the worst served tenth, and how unevenly updates came."""
        _, _, summary = make(PAIR, [[[0.5, 0.8]], [[0.5, 0.9]]])
        arm = summary.arms[0]
        spreads = [arm.wasted, arm.virtual_seconds, arm.worst_tenth, arm.median, arm.best_tenth, arm.gini]
        assert [spread and spread.mean for spread in spreads] == [0.25, 20, 0.5, 0.7, 0.9, 0.5]

    def test_lack_what_a_repeat_did_not_measure(self, make: Make) -> None:
        """A mean over fewer repeats than the others' would compare other seeds."""
        _, _, summary = make(PAIR, [[[0.5], [None]], [[0.5], [0.6]]])
        assert summary.arms[0].accuracy is None
        assert summary.arms[1].against_first is None


class TestTargets:
    def test_are_shares_of_the_best_arms_accuracy(self, make: Make) -> None:
        """The same for every arm, so that their times can be compared."""
        _, _, summary = make(PAIR, [[[0.5, 0.8]], [[0.91, 1.0]]])
        assert summary.targets == (0.9, 0.95, 0.99)
        assert summary.of_best == summary.targets
        first, second = summary.arms
        assert first.targets[0].rounds == ()
        assert (second.targets[0].rounds, second.targets[0].seconds) == ((1,), (10.0,))
        assert second.targets[2].rounds == (2,)

    def test_can_be_given(self, make: Make) -> None:
        """Then they are no shares."""
        _, _, summary = make(PAIR, [[[0.5, 0.8]], [[0.91, 1.0]]], targets=(0.5,))
        assert (summary.targets, summary.of_best) == ((0.5,), ())
        assert [arm.targets[0].rounds for arm in summary.arms] == [(1,), (1,)]

    def test_count_who_reached_them(self, make: Make) -> None:
        """A repeat that did not is not in the mean, and not forgotten."""
        _, _, summary = make(PAIR, [[[0.5, 0.8], [0.5, 0.6]], [[0.5, 0.8], [0.5, 0.8]]], targets=(0.7,))
        target = summary.arms[0].targets[0]
        assert (target.runs, target.rounds) == (2, (2,))

    def test_have_no_seconds_without_virtual_time(self, make: Make) -> None:
        """Rounds remain."""
        _, _, summary = make(PAIR, [[[0.5, 0.8]], [[0.5, 0.9]]], seconds=None, targets=(0.5,))
        assert (summary.arms[0].targets[0].rounds, summary.arms[0].targets[0].seconds) == ((1,), ())


class TestEffects:
    def test_average_over_the_other_settings(self, make: Make) -> None:
        """In a two by two study each setting has an effect of its own."""
        arms = [[[0.60]], [[0.70]], [[0.62]], [[0.74]]]
        _, _, summary = make([*PAIR, "training.momentum=0,0.5"], arms)
        found = {effect.label: effect.accuracy.mean for effect in summary.effects}
        assert found == {"fedprox": pytest.approx(0.03), "momentum 0.5": pytest.approx(0.11)}
        assert [effect.first for effect in summary.effects] == ["fedavg", "momentum 0"]

    def test_of_a_single_setting_are_its_arms_differences(self, make: Make) -> None:
        """And not told twice."""
        _, _, summary = make(PAIR, [[[0.6]], [[0.7]]])
        assert summary.effects == ()
