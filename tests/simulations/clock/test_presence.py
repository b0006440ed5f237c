"""When devices are there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulations.clock.presence import Always, Drawn, Presence, Recorded


def drawn(name: str = "a", share: float = 0.3, mean: float = 100.0, seed: int = 0) -> Drawn:
    return Drawn(seed=seed, name=name, share=share, mean_seconds=mean)


@st.composite
def recorded(draw: st.DrawFn) -> Recorded:
    """Spells with edges on a grid of sevenths, so that rounding errors occur."""
    edges = sorted(draw(st.sets(st.integers(0, 40), min_size=2, max_size=12)))
    edges = edges[: len(edges) // 2 * 2]
    period = (edges[-1] + draw(st.integers(0, 5))) / 7
    return Recorded(tuple((a / 7, b / 7) for a, b in zip(edges[::2], edges[1::2], strict=True)), period=period)


presences = st.one_of(
    recorded(),
    st.builds(
        drawn, st.text("abc", min_size=1, max_size=2), st.floats(0.01, 0.99), st.floats(1e-2, 1e6), st.integers(0, 9)
    ),
    st.just(Always()),
)
moments = st.floats(0, 1e7) | st.integers(0, 500).map(lambda n: n / 7)


class TestEvery:
    """What holds for all kinds."""

    @settings(deadline=None)
    @given(presences, moments)
    @example(Recorded(((0.0, 1 / 7),), period=1 / 7), 41 / 7)
    def test_a_device_that_waits_until_it_is_there_is_there_for_a_while(self, presence: Presence, at: float) -> None:
        """`begins` never lies before the moment, and a spell begins there that ends later."""
        begin = presence.begins(at)
        end = presence.ends(begin)
        assert begin >= at
        assert end is not None
        assert end > begin

    @settings(deadline=None)
    @given(presences, moments, st.floats(0, 0.999))
    def test_it_is_there_until_the_spell_s_end_and_then_away(self, presence: Presence, at: float, part: float) -> None:
        """Within a spell the end is the same at every moment; at the end the spell is over."""
        begin = presence.begins(at)
        end = presence.ends(begin)
        assert end is not None
        if math.isinf(end):
            return
        within = begin + part * (end - begin)
        if within < end:
            assert presence.ends(within) == end
        assert presence.ends(end) != end

    @settings(deadline=None)
    @given(presences, moments)
    def test_nobody_has_to_wait_who_is_there(self, presence: Presence, at: float) -> None:
        """`begins` is the moment itself exactly where `ends` knows an end."""
        assert (presence.begins(at) == at) == (presence.ends(at) is not None)


class TestRecorded:
    """Spells of a trace."""

    def test_spells_repeat_with_the_period(self):
        """What holds in the first period holds in every other."""
        presence = Recorded(((10.0, 20.0), (50.0, 60.0)), period=100.0)
        assert [presence.ends(at) for at in (5, 10, 19.5, 20, 55, 70)] == [None, 20, 20, None, 60, None]
        assert [presence.ends(1000 + at) for at in (5, 10, 20, 55)] == [None, 1020, None, 1060]
        assert [presence.begins(at) for at in (0, 15, 20, 60, 99, 160)] == [10, 15, 50, 110, 110, 210]

    def test_a_spell_over_the_period_s_end_is_one(self):
        """Who is there at the end of a period and at the beginning of the next does not go away in between."""
        presence = Recorded(((0.0, 10.0), (90.0, 100.0)), period=100.0)
        assert presence.ends(95) == 110
        assert presence.ends(105) == 110
        assert presence.ends(0) == 10

    def test_a_spell_as_long_as_the_period_never_ends(self):
        """The device is always there."""
        assert Recorded(((0.0, 100.0),), period=100.0).ends(250) == math.inf


class TestDrawn:
    """Spells from a seed."""

    def test_spells_depend_on_seed_and_name_alone(self):
        """Equal ones have equal spells, others others."""
        moments = np.linspace(0, 5000, 40)
        spells = {key: tuple(drawn(*key).begins(at) for at in moments) for key in [("a", 0.3), ("b", 0.3)]}
        assert spells["a", 0.3] == tuple(drawn("a", 0.3).begins(at) for at in moments)
        assert spells["a", 0.3] != spells["b", 0.3]
        assert spells["a", 0.3] != tuple(drawn("a", 0.3, seed=1).begins(at) for at in moments)

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
    @pytest.mark.parametrize("at", [0.0, 12345.6])
    def test_at_any_moment_the_share_of_devices_is_there(self, share: float, at: float) -> None:
        """Of 4,000 devices the share is there, at the start and later; fails wrongly for fewer than 1 in 10^6 seeds."""
        there = sum(drawn(f"c{i}", share).ends(at) is not None for i in range(4000))
        assert abs(there - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
    def test_spells_last_as_long_as_they_say_on_average(self, share: float) -> None:
        """Means over 2,000 cycles of a device are right to 5 standard errors (1 in 10^6), whose law is uniform."""
        presence, at, lengths = drawn(share=share), 0.0, []
        for _ in range(2000):
            at = presence.begins(at)
            end = presence.ends(at)
            assert end is not None
            lengths.append(end - at)
            at = end
        mean, error = np.mean(lengths[1:]), np.std(lengths[1:]) / math.sqrt(1999)  # the first was joined half-way
        assert abs(mean - 100) < 5 * error
        assert max(lengths) <= min(200.0, 100 / share) + 1e-6

    @pytest.mark.parametrize("long", [2.0**-53, 1 - 2.0**-53])
    @pytest.mark.parametrize("place", [2.0**-53, 1 - 2.0**-53])
    def test_spells_at_the_very_edge_of_a_cycle_are_found(
        self, monkeypatch: pytest.MonkeyPatch, long: float, place: float
    ) -> None:
        """Where rounding puts their first moment into the cycle before, or their last into the one after."""
        monkeypatch.setattr("simulations.clock.presence.uniforms", lambda *words: (long, place))
        presence = drawn(share=0.75, mean=0.7)
        at = 0.0
        for _ in range(500):
            begin = presence.begins(at)
            end = presence.ends(begin)
            assert end is not None
            assert presence.ends(math.nextafter(end, 0)) == end
            at = end
