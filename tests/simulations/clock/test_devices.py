"""What device a client has."""

from __future__ import annotations

import math
import pickle
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.config.simulated import DeviceSettings
from simulations.clock import DrawnDevices, TracedDevices
from simulations.clock.presence import Always, Drawn, Recorded
from tests.simulations.clock.scenes import device


def drawn(seed: int = 0, **fields: Any) -> DrawnDevices:
    return DrawnDevices(settings=DeviceSettings(**{"examples_per_second": 100} | fields), seed=seed)


class TestDrawn:
    """Devices from the settings' distributions."""

    def test_without_spread_all_are_alike_and_transfers_take_no_time(self):
        """The settings' figures, exactly; no bandwidth stands for no limit."""
        one = drawn().of(7, "c7")
        assert (one.examples_per_second, one.dropout, one.presence) == (100, 0, Always())
        assert one.download_seconds(10**9) == one.upload_seconds(10**9) == 0

    def test_bandwidth_is_in_bits_of_a_million(self):
        """8 Mbit/s move a million bytes in a second."""
        one = drawn(download_mbit=8, upload_mbit=4).of(0, "c0")
        assert (one.download_seconds(10**6), one.upload_seconds(10**6)) == (1, 2)

    @settings(deadline=None)
    @given(st.permutations([f"c{i}" for i in range(8)]))
    def test_a_device_is_the_same_whoever_was_looked_at_before(self, order: list[str]) -> None:
        """Any order of looking, and any place in the population, gives each client its own device."""
        devices = drawn(speed_spread=1, download_mbit=5, bandwidth_spread=1, stragglers=0.5, availability=0.5)
        place = Random(0).randrange
        assert {name: devices.of(place(9), name) for name in order} == {
            name: drawn(speed_spread=1, download_mbit=5, bandwidth_spread=1, stragglers=0.5, availability=0.5).of(
                0, name
            )
            for name in order
        }

    def test_a_seed_changes_all_devices(self):
        """Speed, bandwidth and spells."""
        settings = {"speed_spread": 1, "upload_mbit": 5, "bandwidth_spread": 1, "availability": 0.5}
        one, other = drawn(0, **settings).of(0, "c"), drawn(1, **settings).of(0, "c")
        assert one.examples_per_second != other.examples_per_second
        assert one.upload_mbit != other.upload_mbit
        assert one.presence != other.presence

    def test_speeds_and_bandwidths_are_log_normal_and_independent(self):
        """Kolmogorov-Smirnov tests of 2,000 devices, and rank correlation; each fails wrongly with 1 seed in 10^4."""
        devices = drawn(speed_spread=0.7, download_mbit=10, upload_mbit=2, bandwidth_spread=0.4)
        found = [devices.of(i, f"c{i}") for i in range(2000)]
        speed, down, up = (
            np.log([getattr(one, key) for one in found])
            for key in ("examples_per_second", "download_mbit", "upload_mbit")
        )
        for values, median, spread in [(speed, 100, 0.7), (down, 10, 0.4), (up, 2, 0.4)]:
            assert stats.kstest(values, stats.norm(math.log(median), spread).cdf).pvalue > 1e-4
        assert all(stats.spearmanr(a, b).pvalue > 1e-4 for a, b in [(speed, down), (down, up), (speed, up)])

    def test_the_share_of_stragglers_is_slower(self):
        """A binomial test of 2,000 devices; fails wrongly with 1 seed in 10^6."""
        devices = drawn(stragglers=0.3, straggler_slowdown=4)
        speeds = [devices.of(i, f"c{i}").examples_per_second for i in range(2000)]
        assert set(speeds) == {100, 25}
        assert stats.binomtest(speeds.count(25), 2000, 0.3).pvalue > 1e-6

    def test_who_is_a_straggler_has_nothing_to_do_with_its_speed(self):
        """A rank-sum test of what 2,000 devices' speeds would be; fails wrongly with 1 seed in 10^4."""
        plain, slowed = drawn(speed_spread=1), drawn(speed_spread=1, stragglers=0.3)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for i in range(2000):
            own = plain.of(i, f"c{i}").examples_per_second
            speeds[slowed.of(i, f"c{i}").examples_per_second < own].append(own)
        assert stats.mannwhitneyu(speeds[True], speeds[False]).pvalue > 1e-4

    def test_all_or_no_stragglers(self):
        """The ends of the scale are exact."""
        assert {drawn(stragglers=1).of(i, f"c{i}").examples_per_second for i in range(200)} == {10}
        assert {drawn(stragglers=0).of(i, f"c{i}").examples_per_second for i in range(200)} == {100}

    def test_devices_are_away_only_below_an_availability_of_one(self):
        """Else nobody looks at spells."""
        assert not drawn().away_at_times
        assert drawn(availability=0.99).away_at_times
        assert isinstance(drawn(availability=0.99).of(0, "c").presence, Drawn)

    def test_settings_travel_and_devices_do_not(self):
        """What another process is given is small, whatever the population."""
        devices = drawn(speed_spread=1)
        assert len(pickle.dumps(devices)) < 2000
        assert pickle.loads(pickle.dumps(devices)).of(0, "c5") == devices.of(0, "c5")  # noqa: S301 - our own


class TestTraced:
    """Devices of a trace."""

    LINES = (device(1), device(2), device(3))

    def test_lines_without_names_are_dealt_in_turn(self):
        """By the client's place, round and round."""
        devices = TracedDevices(lines=self.LINES, named={})
        assert [devices.of(place, "x").examples_per_second for place in range(5)] == [1, 2, 3, 1, 2]

    def test_named_lines_belong_to_their_clients(self):
        """Whatever their place."""
        devices = TracedDevices(lines=self.LINES, named={"a": 2, "b": 0})
        assert [devices.of(9, name).examples_per_second for name in ("a", "b")] == [3, 1]

    @pytest.mark.parametrize("away", [True, False])
    def test_it_knows_whether_anybody_is_ever_away(self, away: bool) -> None:
        """One line with spells is enough."""
        presence = Recorded(((0.0, 1.0),), period=2.0) if away else None
        assert TracedDevices(lines=(*self.LINES, device(presence=presence)), named={}).away_at_times is away
