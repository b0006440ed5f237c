"""Cohorts among those who are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scipy import stats

from common.config import CohortSettings
from common.config.simulated import DeviceSettings
from common.errors import ConfigError
from common.names import NumberedNames
from server.cohort import CohortSampler
from simulations.clock import AvailableSampler, Device, Devices, DrawnDevices, Timing, VirtualClock
from simulations.clock.presence import Presence, Recorded
from simulations.clock.virtual import Launch
from tests.simulations.clock.scenes import WORK, Listed, device, names_of


def sampler(
    devices: Devices,
    *,
    size: int = 2,
    clock: VirtualClock | None = None,
    place: Callable[[str], int] = lambda name: int(name.rpartition("c")[2]),
    seed: int = 0,
    **settings: Any,
) -> AvailableSampler:
    return AvailableSampler(
        CohortSettings(size=size, **settings),
        seed=seed,
        timing=Timing(devices=devices, workload=WORK, seed=0),
        clock=clock or VirtualClock(),
        place=place,
    )


def there(*spells: tuple[float, float]) -> Listed:
    """Client i is there from and to these moments, every 100 seconds."""
    return Listed(devices=[device(presence=Recorded((spell,), period=100.0)) for spell in spells])


def share(availability: float) -> DrawnDevices:
    return DrawnDevices(settings=DeviceSettings(examples_per_second=1, availability=availability), seed=4)


class TestWhoIsAsked:
    """Only devices that are there."""

    def test_only_those_who_are_there_now(self):
        """And who that is changes with the clock."""
        devices = there((0, 50), (50, 100), (0, 100), (50, 100))
        clock = VirtualClock()
        drawn = sampler(devices, clock=clock)
        assert drawn.sample(1, names_of(4)) == ["c0", "c2"]
        clock.advance(50)
        for server_round in range(2, 30):
            cohort = drawn.sample(server_round, names_of(4))
            assert len(cohort) == 2
            assert set(cohort) <= {"c1", "c2", "c3"}

    def test_fewer_than_asked_for_where_fewer_are_there(self):
        """The round takes place with them."""
        assert sampler(there((0, 50), (50, 100)), size=2).sample(1, names_of(2)) == ["c0"]

    def test_all_that_are_there_where_all_are_asked(self):
        """`cohort.size` 0."""
        assert sampler(there((0, 50), (50, 100), (0, 1)), size=0).sample(1, names_of(3)) == ["c0", "c2"]

    def test_over_sampling_asks_for_more(self):
        """As many as `CohortSettings.asked` says."""
        devices = there(*[(0, 50)] * 10)
        assert len(sampler(devices, size=4, over_sampling=0.5).sample(1, names_of(10))) == 6

    def test_where_nobody_is_there_the_clock_goes_on_until_somebody_is(self):
        """To the first spell of all, not further."""
        clock = VirtualClock()
        assert sampler(there((30, 40), (20, 25), (60, 70)), clock=clock).sample(1, names_of(3)) == ["c1"]
        assert clock.now == 20

    def test_while_somebody_is_at_work_nobody_waits(self):
        """Their answers come first: the cohort is empty, and the clock stays."""
        clock = VirtualClock()
        clock.launches["c1", 1] = Launch(at=0.0, ends=9.0)
        assert sampler(there((30, 40), (20, 25)), clock=clock).sample(1, names_of(2)) == []
        assert clock.now == 0

    def test_where_all_are_there_it_is_the_cohort_of_a_run_without_virtual_time(self):
        """So that devices that are never away change nothing."""
        clients = names_of(20)
        devices = Listed(devices=[device()] * 20)
        settings = CohortSettings(size=5)
        for server_round in range(1, 6):
            plain = CohortSampler(settings, seed=3).sample(server_round, clients)
            assert sampler(devices, size=5, seed=3).sample(server_round, clients) == plain

    @pytest.mark.parametrize("count", [40, 70_000])
    def test_the_order_of_the_clients_does_not_matter(self, count: int) -> None:
        """Neither does asking twice."""
        clients = [f"c{i:05}" for i in range(count)]
        one, other = (sampler(share(0.5), size=5) for _ in range(2))
        assert one.sample(3, clients) == other.sample(3, clients[::-1]) == one.sample(3, clients)
        assert one.sample(3, clients) != one.sample(4, clients)
        assert one.sample(3, clients) != sampler(share(0.5), size=5, seed=1).sample(3, clients)

    @pytest.mark.parametrize("count", [50, pytest.param(70_000, marks=pytest.mark.slow)])
    def test_all_who_are_there_are_equally_likely(self, count: int) -> None:
        """Chi-squared test over ten ranges of places, 3,000 draws; fails wrongly with 1 seed in 10^6."""
        clients = NumberedNames(count, word="c")
        devices = share(0.5)
        moment = 0.0
        present = [devices.of(0, name).presence.ends(moment) is not None for name in clients]
        drawn = sampler(devices, size=10, place=lambda _: 0)
        counts, expected = [0] * 10, [0.0] * 10
        each = 3000 / sum(present)
        for i, here in enumerate(present):
            expected[i * 10 // count] += each * here
        for server_round in range(300):
            for name in drawn.sample(server_round + 1, clients):
                counts[clients.index(name) * 10 // count] += 1
        assert sum(counts) == 3000
        assert stats.chisquare(counts, expected).pvalue > 1e-6


class TestMillions:
    """Large populations."""

    def test_of_a_million_clients_only_those_are_looked_at_who_might_be_drawn(self):
        """About size / availability of them."""
        looked: list[str] = []

        class Watched(DrawnDevices):
            def presence(self, place: int, name: str) -> Presence:
                looked.append(name)
                return super().presence(place, name)

        settings = DeviceSettings(examples_per_second=1, availability=0.2)
        clients = NumberedNames(1_000_000, word="c")
        cohort = sampler(Watched(settings=settings, seed=0), size=100).sample(1, clients)
        assert len(set(cohort)) == 100
        assert len(looked) < 1000  # 500 on average; 1,000 are beyond 20 standard deviations

    def test_where_hardly_anybody_is_there_they_are_still_found(self):
        """All are looked at then, each once."""
        present = {"c-00007", "c-69999"}

        class Few:
            away_at_times = True
            looked = 0

            def of(self, place: int, name: str) -> Device:
                raise AssertionError(name)

            def presence(self, place: int, name: str) -> Presence:
                self.looked += 1
                return Recorded(((0.0, 50.0) if name in present else (50.0, 100.0),), period=100.0)

        devices = Few()
        assert sampler(devices, size=5).sample(1, NumberedNames(70_000, word="c")) == sorted(present)
        assert devices.looked == 70_000


class TestRefusals:
    """What cannot be done."""

    @pytest.mark.parametrize("kind", ["balanced", "cyclic", "poisson"])
    def test_other_cohorts_than_uniform_ones(self, kind: str) -> None:
        """They promise something about who is asked, which a device that is away would break."""
        with pytest.raises(ConfigError, match=kind):
            sampler(share(0.5), sampling=kind)

    def test_a_cohort_above_the_population(self):
        """Whoever is there."""
        with pytest.raises(ConfigError, match="only 3 clients"):
            sampler(share(0.5), size=4).sample(1, names_of(3))

    def test_a_name_twice(self):
        """As in a run without virtual time."""
        with pytest.raises(ConfigError, match="same name"):
            sampler(share(0.5), size=1).sample(1, ["c1", "c1"])


def test_it_keeps_nothing_but_the_moment():
    """A new sampler goes on where another stopped, given the clock."""
    clock = VirtualClock()
    one = sampler(share(0.5), size=5, clock=clock)
    clients: Sequence[str] = names_of(60)
    one.sample(1, clients)
    clock.advance(5000)
    again = VirtualClock()
    again.restore(json.loads(json.dumps(clock.state())))
    other = sampler(share(0.5), size=5, clock=again)
    other.restore(one.state())
    assert one.state() == {}
    assert other.sample(2, clients) == one.sample(2, clients)
