"""How long clients take, who is late, who goes away, and when a round ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.config.simulated import DeviceSettings
from common.errors import FailureCode
from simulations.clock import DrawnDevices, Timing, Visit, Workload, settle
from simulations.clock.presence import Presence, Recorded
from simulations.clock.workload import examples_after
from tests.simulations.clock.scenes import WORK, device, timing

LOST, LATE = FailureCode.CLIENT_LOST, FailureCode.DEADLINE_EXCEEDED


def visit(rules: Timing, *, examples: int = 40, at: float = 0.0, server_round: int = 1) -> Visit:
    return rules.visit(0, "c0", examples=examples, server_round=server_round, at=at)


class TestVisit:
    """What becomes of one client."""

    def test_it_downloads_trains_and_uploads(self):
        """2 seconds for 1 MB at 4 Mbit/s, 40 examples at 20 a second, 8 seconds for 0.5 MB at half a Mbit/s."""
        work = replace(WORK, download_bytes=10**6, upload_bytes=5 * 10**5)
        rules = timing(device(20, download_mbit=4, upload_mbit=0.5), work=work)
        assert visit(rules) == Visit(seconds=2 + 2 + 8, failure=None)

    def test_who_is_not_done_at_the_deadline_is_late(self):
        """It worked until then; exactly in time is in time."""
        assert visit(timing(device(2), deadline_seconds=20)) == Visit(seconds=20, failure=None)
        assert visit(timing(device(2), deadline_seconds=19)) == Visit(seconds=19, failure=LATE)

    def test_who_goes_away_before_it_is_done_is_lost(self):
        """It worked until its spell ended; exactly at the end is done."""
        presence = Recorded(((0.0, 100.0),), period=200.0)
        rules = timing(device(2, presence=presence))
        assert visit(rules, at=80) == Visit(seconds=20, failure=None)
        assert visit(rules, at=85) == Visit(seconds=15, failure=LOST)

    def test_who_is_away_is_lost_at_once(self):
        """It did no work."""
        presence = Recorded(((0.0, 100.0),), period=200.0)
        assert visit(timing(device(2, presence=presence)), at=100) == Visit(seconds=0, failure=LOST)

    def test_what_comes_first_counts(self):
        """A device that would be late and goes away before is lost; one that would go away later is late."""
        presence = Recorded(((0.0, 100.0),), period=200.0)
        rules = timing(device(0.1, presence=presence), deadline_seconds=30)
        assert visit(rules, at=75) == Visit(seconds=25, failure=LOST)
        assert visit(rules, at=70) == Visit(seconds=30, failure=LATE)

    def test_the_share_of_dropouts_goes_away_at_any_time_of_its_work(self):
        """Of 4,000 visits; binomial and Kolmogorov-Smirnov tests that fail wrongly with 1 seed in 10^6 and 10^4."""
        rules = timing(device(2, dropout=0.3))
        visits = [visit(rules, server_round=r) for r in range(4000)]
        lost = [v.seconds for v in visits if v.failure is LOST]
        assert {v.seconds for v in visits if v.failure is None} == {20}
        assert stats.binomtest(len(lost), 4000, 0.3).pvalue > 1e-6
        assert stats.kstest(lost, stats.uniform(0, 20).cdf).pvalue > 1e-4

    def test_a_dropout_after_the_deadline_is_late(self):
        """Nobody waited for it any more."""
        rules = timing(device(2, dropout=0.9), deadline_seconds=10)
        fates = {visit(rules, server_round=r) for r in range(200)}
        assert Visit(seconds=10, failure=LATE) in fates
        assert all(v.seconds < 10 for v in fates if v.failure is LOST)
        assert {v.failure for v in fates} == {LOST, LATE}

    def test_a_visit_depends_on_seed_client_round_and_moment_alone(self):
        """Asked again, in any order and by another object, it is the same; another seed drops others out."""
        settings = DeviceSettings(examples_per_second=3, speed_spread=1, dropout=0.5, availability=0.7)

        def rules(seed: int) -> Timing:
            return Timing(devices=DrawnDevices(settings=settings, seed=seed), workload=WORK, seed=seed)

        def found(seed: int, order: list[int]) -> dict[int, Visit]:
            return {i: rules(seed).visit(i, f"c{i}", examples=9, server_round=2, at=50) for i in order}

        forward = found(0, list(range(30)))
        assert forward == found(0, list(reversed(range(30))))
        assert forward != found(1, list(range(30)))

    def test_without_examples_only_transfers_take_time(self):
        """There is nothing to train on."""
        assert visit(timing(device(2)), examples=0) == Visit(seconds=0, failure=None)


class TestPartialWork:
    """A device that cannot finish sends what it has trained."""

    WORK = Workload(download_bytes=10**6, upload_bytes=10**6, batch_size=10, local_steps=0, local_epochs=2)

    def rules(
        self, speed: float, deadline: float, *, work: Workload = WORK, presence: Presence | None = None
    ) -> Timing:
        devices = device(speed, download_mbit=8, upload_mbit=8, presence=presence)
        return timing(devices, work=work, deadline_seconds=deadline, partial_work=True)

    def test_it_takes_the_steps_that_fit_between_download_and_upload(self):
        """10 seconds less 2 for transfers are time for 24 of 70 examples at 3 a second: 2 steps of 10."""
        rules = self.rules(3, 10)
        assert rules.most_steps(0, "c0", examples=35) == 2
        assert visit(rules, examples=35) == Visit(seconds=2 + 20 / 3, failure=None)

    def test_smaller_last_batches_take_less(self):
        """35 examples are four steps, the fifth begins the next epoch."""
        assert self.rules(1, 2 + 35).most_steps(0, "c0", examples=35) == 4
        assert self.rules(1, 2 + 44).most_steps(0, "c0", examples=35) == 4
        assert self.rules(1, 2 + 45).most_steps(0, "c0", examples=35) == 5

    def test_who_can_finish_is_not_limited(self):
        """None stands for all steps."""
        assert self.rules(7, 12).most_steps(0, "c0", examples=35) is None
        assert visit(self.rules(7, 12), examples=35) == Visit(seconds=12, failure=None)

    def test_who_cannot_take_one_step_is_late(self):
        """Also where the transfers alone take too long."""
        for rules in (self.rules(1, 11.9), self.rules(1, 1)):
            assert rules.most_steps(0, "c0", examples=35) == 0
            assert visit(rules, examples=35).failure is LATE

    def test_who_goes_away_sends_nothing(self):
        """Partial work is about the deadline: a device does not know when it will be gone."""
        rules = self.rules(3, 10, presence=Recorded(((0.0, 5.0),), period=50.0))
        assert visit(rules, examples=35) == Visit(seconds=5, failure=LOST)

    def test_without_partial_work_nobody_is_limited(self):
        """Who cannot finish is late."""
        rules = replace(self.rules(3, 10), partial_work=False)
        assert rules.most_steps(0, "c0", examples=35) is None
        assert visit(rules, examples=35) == Visit(seconds=10, failure=LATE)

    @settings(deadline=None)
    @given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4), st.integers(0, 200), st.integers(1, 30), st.integers(0, 40))
    def test_a_limited_client_is_in_time_with_as_many_steps_as_there_is_time_for(
        self, speed: float, deadline: float, examples: int, batch: int, steps: int
    ) -> None:
        """Both sides agree: who may take a step or more answers by the deadline, who may take none is late."""
        work = replace(self.WORK, batch_size=batch, local_steps=steps)
        rules = self.rules(speed, deadline, work=work)
        most, told = rules.most_steps(0, "c0", examples=examples), visit(rules, examples=examples)
        assert (told.failure is None) == (most != 0)
        assert told.seconds <= deadline
        if most:
            assert most < work.steps(examples) or math.isclose(told.seconds, deadline)
            more = 2 + examples_after(most + 1, count=examples, batch_size=batch) / speed
            assert more > deadline or math.isclose(more, deadline)


def visits(*told: tuple[float, FailureCode | None]) -> list[Visit]:
    return [Visit(seconds=seconds, failure=failure) for seconds, failure in told]


class TestSettle:
    """When a round ends."""

    def test_it_ends_with_the_last_whatever_became_of_it(self):
        """Also with one that is late or lost."""
        for last in (None, LOST, LATE):
            told = visits((3, None), (9, last), (5, None))
            assert settle(told, None) == (told, 9)

    def test_nobody_asked_takes_no_time(self):
        """An empty cohort."""
        assert settle([], None) == ([], 0)
        assert settle([], 1) == ([], 0)

    def test_enough_answers_end_it(self):
        """Who is still at work then is told to stop, and worked until then; who was lost before stays lost."""
        told = visits((3, None), (9, None), (5, None), (4, LOST), (8, LOST), (30, LATE))
        late = (5, LATE)
        assert settle(told, 2) == (visits((3, None), late, (5, None), (4, LOST), late, late), 5)

    def test_of_two_at_the_same_moment_the_first_counts(self):
        """Ties go by the cohort's order."""
        assert settle(visits((5, None), (5, None), (5, None)), 2) == (visits((5, None), (5, None), (5, LATE)), 5)

    def test_with_fewer_answers_than_are_enough_everybody_is_waited_for(self):
        """As if none had been asked beyond."""
        told = visits((3, None), (9, LOST))
        assert settle(told, 2) == (told, 9)

    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.floats(0, 100) | st.integers(0, 5), st.sampled_from([None, LOST, LATE])), max_size=12),
        st.integers(1, 12) | st.none(),
    )
    def test_nobody_works_longer_than_the_round_or_than_it_would_have(
        self, told: list[tuple[float, FailureCode | None]], enough: int | None
    ) -> None:
        """And as many answers count as are there, up to those that are enough."""
        before = visits(*told)
        after, end = settle(before, enough)
        assert all(a.seconds <= min(b.seconds, end) for a, b in zip(after, before, strict=True))
        answers = sum(v.failure is None for v in before)
        assert sum(v.failure is None for v in after) == (answers if enough is None else min(answers, enough))


@pytest.mark.parametrize("place", [0, 1])
def test_each_client_has_its_own_device(place: int) -> None:
    """Looked up by its place and name."""
    rules = timing(device(1), device(2))
    told = rules.visit(place, f"c{place}", examples=10, server_round=1, at=0)
    assert told.seconds == 10 / (place + 1)
