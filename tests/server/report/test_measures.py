"""What rounds and clients amount to, against figures worked out by hand or by definition."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.measures import (
    describe_course,
    fairness,
    final_accuracy,
    participation,
    reached,
    staleness,
    work,
)
from server.report.record import Result, RoundRow


def rows(*accuracies, seconds=10.0, **more):
    return [
        RoundRow.model_validate(
            {
                "server_round": i, "accuracy": a, "cohort": ["a", "b"], "survivors": ["a"],
                "clock": {"at_seconds": seconds * i, "work_seconds": 8, "wasted_seconds": 2}, **more,
            }
        )
        for i, a in enumerate(accuracies, 1)
    ]  # fmt: skip


class TestReached:
    def test_names_the_first_evaluation_with_at_least_that_accuracy(self):
        """Rounds that were not evaluated are passed over, and a later fall does not matter."""
        found = reached(rows(0.2, None, 0.7, 0.6), 0.7)
        assert (found.server_round, found.seconds) == (3, 30.0)

    def test_says_so_where_it_was_never_reached(self):
        """Neither a round nor a time is made up."""
        found = reached(rows(0.2, 0.3), 0.7)
        assert (found.accuracy, found.server_round, found.seconds) == (0.7, None, None)

    def test_has_no_time_without_a_clock(self):
        """A run in real time alone has rounds, and no virtual seconds."""
        found = reached(rows(0.9, clock=None), 0.7)
        assert (found.server_round, found.seconds) == (1, None)


def test_final_accuracy_is_the_results_or_the_last_that_was_measured():
    """A run that chose its best round is judged by that one; an interrupted run by what it has."""
    assert final_accuracy(rows(0.5, 0.4), Result(accuracy=0.5)) == 0.5
    assert final_accuracy(rows(0.5, 0.4, None), None) == 0.4
    assert final_accuracy(rows(None), None) is None


def test_work_is_added_up_and_the_end_is_the_last_rounds():
    """Seconds on the clock do not add up; work does. Without a clock there is neither."""
    found = work(rows(0.1, 0.2, 0.3))
    assert (found.seconds, found.work_seconds, found.wasted_seconds, found.wasted_share) == (30, 24, 6, 0.25)
    assert work(rows(0.1, clock=None)) is None
    assert work(rows(0.1, clock={"at_seconds": 5})).wasted_share == 0


class TestFairness:
    def test_tenths_are_means_of_the_worst_and_the_best_served(self):
        """Of twenty clients the two worst and the two best; of few, one."""
        found = fairness([i / 100 for i in range(20)])
        assert (found.clients, found.worst_tenth, found.best_tenth) == (20, 0.005, 0.185)
        assert found.median == pytest.approx(0.095)
        assert fairness([0.4, 0.6]).worst_tenth == 0.4

    def test_nobody_measured_is_no_fairness(self):
        """Instead of zeros."""
        assert fairness([]) is None

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
    def test_the_worst_are_never_served_better_than_the_median_nor_this_better_than_the_best(self, values):
        """Whatever the clients' accuracies."""
        found = fairness(values)
        assert found.worst_tenth <= found.median + 1e-12
        assert found.median <= found.best_tenth + 1e-12


def given_by(*counts):
    """Rounds in which client i gave so many updates."""
    return [
        RoundRow(server_round=r, survivors=[f"c{i}" for i, n in enumerate(counts) if r <= n])
        for r in range(1, max(counts, default=0) + 1)
    ]


class TestParticipation:
    def test_counts_updates_that_were_used(self):
        """A client of the population that gave none counts with none."""
        found = participation(given_by(3, 1, 1), clients=4)
        assert (found.clients, found.took_part, found.fewest, found.median, found.most) == (4, 3, 0, 1, 3)
        assert found.counts == {0: 1, 1: 2, 3: 1}

    @given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any), st.integers(0, 5))
    def test_gini_is_the_mean_difference_over_twice_the_mean(self, counts, silent):
        """The coefficient's definition, computed pair by pair."""
        everybody = [*counts, *[0] * silent]
        n, mean = len(everybody), sum(everybody) / len(everybody)
        defined = sum(abs(a - b) for a in everybody for b in everybody) / (2 * n * n * mean)
        assert participation(given_by(*counts), clients=n).gini == pytest.approx(defined, abs=1e-12)

    def test_equal_shares_have_no_gini_and_nobody_has_none(self):
        """Nought where all gave alike; nothing where nobody gave."""
        assert participation(given_by(2, 2, 2), clients=3).gini == 0
        assert participation([RoundRow(server_round=1)], clients=3) is None

    def test_a_million_clients_cost_no_more_than_those_that_took_part(self):
        """The silent ones are a number, not a list."""
        found = participation(given_by(1, 2), clients=1_000_000)
        assert found.counts == {0: 999_998, 1: 1, 2: 1}
        assert found.gini == pytest.approx(1, abs=1e-5)


def test_staleness_is_counted_over_all_updates():
    """Mean, largest, and how many of each; none in synchronous rounds."""
    found = staleness(
        [RoundRow(server_round=1, staleness={"a": 0, "b": 2}), RoundRow(server_round=2, staleness={"a": 1})]
    )
    assert (found.mean, found.most, found.counts) == (1.0, 2, {0: 1, 1: 1, 2: 1})
    assert staleness(rows(0.1)) is None


class TestDocument:
    def test_is_what_a_script_wants_to_know(self):
        """Times to three shares of the final accuracy, virtual time, participation and fairness; counts stay out."""
        raw = [row.model_dump() for row in rows(0.5, 0.78, 0.8)]
        found = describe_course(raw, accuracy=0.8, clients=2, measured=[0.7, 0.9])
        assert [(r["share"], r["server_round"], r["seconds"]) for r in found["reached"]] == [
            (0.9, 2, 20.0), (0.95, 2, 20.0), (0.99, 3, 30.0),
        ]  # fmt: skip
        assert all(a["accuracy"] < b["accuracy"] for a, b in pairwise(found["reached"]))
        assert found["virtual"] == {"seconds": 30, "work_seconds": 24, "wasted_seconds": 6, "wasted_share": 0.25}
        assert found["participation"]["gini"] == 0.5
        assert found["fairness"]["worst_tenth"] == 0.7
        assert found["staleness"] is None

    def test_leaves_null_what_a_run_has_not(self):
        """An older run's rows lack clock and staleness."""
        found = describe_course([{"server_round": 1}], accuracy=None, clients=3, measured=[])
        assert found == {"reached": [], "virtual": None, "staleness": None, "participation": None, "fairness": None}
