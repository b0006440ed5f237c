"""Cohorts are repeatable, sorted, and nobody takes part more often than promised."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import CohortSettings
from common.errors import ConfigError, RunError
from common.privacy.noise import KeyedNoise
from server.cohort import CohortSampler, min_separation, participations

SAMPLINGS = ("uniform", "balanced")
FIXED = (*SAMPLINGS, "cyclic")
"""Cohorts that follow from configuration, seed and round."""
EVERY = (*FIXED, "poisson")
samplings, fixed, every = st.sampled_from(SAMPLINGS), st.sampled_from(FIXED), st.sampled_from(EVERY)
seeds = st.integers(0, 2**63 - 1)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """A number of clients, and a cohort size that fits."""
    clients = draw(st.integers(1, 12))
    return clients, draw(st.integers(1, clients))


def names(count: int) -> list[str]:
    return [f"site-{i}" for i in range(count)]


def sampler(sampling: str, size: int, seed: int = 0) -> CohortSampler:
    return CohortSampler(CohortSettings(size=size, sampling=sampling), seed=seed)  # type: ignore[arg-type]


class TestSample:
    """`CohortSampler.sample`."""

    @given(samplings, sizes(), seeds, st.integers(1, 10**6))
    def test_a_cohort_is_sorted_distinct_and_of_the_size_asked(
        self, sampling: str, n_k: tuple[int, int], seed: int, server_round: int
    ) -> None:
        """A cohort is a sorted choice of distinct clients, as many as configured."""
        cohort = sampler(sampling, n_k[1], seed).sample(server_round, names(n_k[0]))
        assert len(cohort) == n_k[1]
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(names(n_k[0]))

    @pytest.mark.parametrize("sampling", EVERY)
    def test_size_zero_asks_all(self, sampling: str) -> None:
        """With size 0 everybody takes part in every round."""
        assert sampler(sampling, 0).sample(3, ["b", "a"]) == ["a", "b"]

    @given(fixed, sizes(), seeds, st.randoms(use_true_random=False))
    def test_the_order_of_names_does_not_matter(
        self, sampling: str, n_k: tuple[int, int], seed: int, shuffler: Any
    ) -> None:
        """Equal seeds give equal cohorts, in whatever order clients are listed."""
        one, other = sampler(sampling, n_k[1], seed), sampler(sampling, n_k[1], seed)
        for server_round in range(1, 4):
            clients = names(n_k[0])
            expected = one.sample(server_round, clients)
            shuffler.shuffle(clients)
            assert other.sample(server_round, clients) == expected

    def test_uniform_depends_on_seed_and_round_only(self) -> None:
        """A uniform cohort is the same whatever was drawn before, and changes with seed and round."""
        clients = names(50)
        used = sampler("uniform", 10)
        for server_round in range(1, 5):
            used.sample(server_round, clients)
        assert used.sample(5, clients) == sampler("uniform", 10).sample(5, clients)
        cohorts = {tuple(sampler("uniform", 10, seed).sample(r, clients)) for seed in range(3) for r in (1, 2, 3)}
        assert len(cohorts) == 9

    def test_uniform_draws_every_client_about_equally_often(self) -> None:
        """Over 2000 rounds of 3 in 10 each count lies within 6 standard deviations: a false alarm in 10^8 runs."""
        drawn = sampler("uniform", 3)
        counts = Counter(name for r in range(1, 2001) for name in drawn.sample(r, names(10)))
        assert all(abs(counts[name] - 600) < 6 * (2000 * 0.3 * 0.7) ** 0.5 for name in names(10))

    def test_balanced_ties_are_drawn(self) -> None:
        """Among clients that took part equally often, chance decides, not the alphabet."""
        firsts = Counter(sampler("balanced", 1, seed).sample(1, names(4))[0] for seed in range(60))
        assert set(firsts) == set(names(4))

    def test_balanced_takes_everybody_before_anybody_twice(self) -> None:
        """Two cohorts of half the clients do not overlap."""
        drawn = sampler("balanced", 5)
        assert sorted(drawn.sample(1, names(10)) + drawn.sample(2, names(10))) == sorted(names(10))

    @pytest.mark.parametrize("sampling", EVERY)
    def test_a_cohort_larger_than_the_federation_is_refused(self, sampling: str) -> None:
        """There cannot be more clients in a cohort than there are."""
        with pytest.raises(ConfigError, match=r"cohort\.size is 4, but there are only 3 clients"):
            sampler(sampling, 4).sample(1, names(3))

    @pytest.mark.parametrize(
        ("size", "share", "asked"), [(10, 0.1, 11), (10, 0.0, 10), (3, 0.5, 5), (2, 1.0, 4), (0, 0.0, 0)]
    )
    def test_over_sampling_asks_more(self, size: int, share: float, asked: int) -> None:
        """By a share, rounded up; a tenth of ten is one, also in floating point."""
        settings = CohortSettings(size=size, over_sampling=share)
        assert settings.asked() == asked
        assert len(CohortSampler(settings, seed=0).sample(1, names(20))) == (asked or 20)

    @pytest.mark.parametrize("sampling", ["balanced", "cyclic"])
    def test_over_sampling_counts_for_all_who_are_asked(self, sampling: Any) -> None:
        """Whoever is asked pays for the round, also where their update comes too late."""
        settings = CohortSettings(size=2, over_sampling=0.5, sampling=sampling)
        drawn = CohortSampler(settings, seed=0)
        taken = Counter(name for r in range(1, 8) for name in drawn.sample(r, names(6)))
        assert max(taken.values()) <= participations(settings, 6, 7) == 4

    def test_over_sampling_beyond_the_federation_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"cohort\.size is 3 and 2 are asked beyond it, but there are only 4"):
            CohortSampler(CohortSettings(size=3, over_sampling=0.5), seed=0).sample(1, names(4))

    @pytest.mark.parametrize("size", [0, 1])
    def test_a_federation_of_nobody_is_refused(self, size: int) -> None:
        """Without clients there is nothing to draw, not even everybody."""
        with pytest.raises(ConfigError, match="no clients"):
            sampler("uniform", size).sample(1, [])

    def test_two_clients_of_one_name_are_refused(self) -> None:
        """Names are what participation is counted by."""
        with pytest.raises(ConfigError, match="same name"):
            sampler("balanced", 1).sample(1, ["a", "a"])

    @pytest.mark.parametrize("sampling", ["balanced", "cyclic"])
    def test_other_clients_later_are_refused(self, sampling: str) -> None:
        """A client that joins or leaves in the middle would break the bounds that noise is calibrated to."""
        drawn = sampler(sampling, 1)
        drawn.sample(1, ["a", "b"])
        for clients in (["a"], ["a", "b", "c"], ["a", "c"]):
            with pytest.raises(RunError, match="same clients every round"):
                drawn.sample(2, clients)
        assert sum(drawn.state().values()) == 1


class TestCyclic:
    """Fixed groups in turn."""

    @given(sizes(), st.integers(1, 40))
    def test_groups_come_in_turn_and_cover_everybody_once(self, n_k: tuple[int, int], first: int) -> None:
        """From any round on, one turn asks every client once; groups hold at least `size` and differ by one at most."""
        clients, size = n_k
        drawn, total = sampler("cyclic", size), clients // size
        turn = [drawn.sample(first + i, names(clients)) for i in range(total)]
        assert sorted(name for cohort in turn for name in cohort) == sorted(names(clients))
        assert size <= min(map(len, turn)) <= max(map(len, turn)) <= min(map(len, turn)) + 1
        assert drawn.sample(first + total, names(clients)) == turn[0]

    def test_groups_follow_names_and_round_only(self) -> None:
        """Neither seed nor earlier rounds change who is asked when."""
        assert sampler("cyclic", 2, seed=1).sample(8, names(7)) == sampler("cyclic", 2, seed=2).sample(8, names(7))
        assert [sampler("cyclic", 2).sample(t, names(7)) for t in (1, 2, 3)] == [
            ["site-0", "site-1"],
            ["site-2", "site-3"],
            ["site-4", "site-5", "site-6"],
        ]


class TestPoisson:
    """Each client by itself, unpredictably."""

    def test_everybody_is_drawn_independently(self) -> None:
        """Over 4000 rounds of 3 in 10, each client's count and each pair's lie within 6 standard deviations of what
        independent draws give: a false alarm in 10^7 runs.
        """
        drawn, rounds, members = sampler("poisson", 3), 4000, names(10)
        cohorts = [set(drawn.sample(t, members)) for t in range(1, rounds + 1)]
        taken = np.array([[name in cohort for name in members] for cohort in cohorts])
        together = taken.T.astype(int) @ taken
        for i in range(10):
            for j in range(10):
                p = 0.3 if i == j else 0.09
                assert abs(together[i, j] - rounds * p) < 6 * (rounds * p * (1 - p)) ** 0.5
        sizes = taken.sum(1)
        assert (sizes == 0).any(), "an empty cohort is a cohort"
        assert abs(sizes.var() / (10 * 0.3 * 0.7) - 1) < 6 * (2 / rounds) ** 0.5 + 0.01

    def test_seeds_do_not_decide(self) -> None:
        """Two runs with the same seed draw other cohorts: with 64 clients and 4 rounds, the same once in 2^256."""
        draws = [[sampler("poisson", 32, seed=5).sample(t, names(64)) for t in range(4)] for _ in range(2)]
        assert draws[0] != draws[1]

    def test_a_source_can_be_given(self) -> None:
        """A simulation that must repeat gives a source for each round; the state stays empty."""

        def drawn() -> list[list[str]]:
            settings = CohortSettings(size=3, sampling="poisson")
            one = CohortSampler(
                settings, seed=0, noise=lambda t: KeyedNoise(noise_key=bytes(32), mask_key=bytes([t]) * 32)
            )
            cohorts = [one.sample(t, names(9)) for t in range(6)]
            assert one.state() == {}
            return cohorts

        assert drawn() == drawn()
        assert len({tuple(cohort) for cohort in drawn()}) > 1

    @given(sizes())
    def test_a_cohort_is_sorted_and_distinct(self, n_k: tuple[int, int]) -> None:
        """Any number of distinct clients, in order."""
        cohort = sampler("poisson", n_k[1]).sample(1, names(n_k[0]))
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(names(n_k[0]))
        if n_k[0] == n_k[1]:
            assert len(cohort) == n_k[0], "with probability 1"


class TestMinSeparation:
    """`min_separation` and the expected size."""

    @given(every, sizes(), st.integers(1, 30))
    def test_nobody_is_asked_again_sooner(self, sampling: str, n_k: tuple[int, int], rounds: int) -> None:
        """Between two participations of a client lie at least as many rounds."""
        clients, size = n_k
        drawn, last = sampler(sampling, size), dict.fromkeys(names(clients), -(10**6))
        least = min_separation(CohortSettings(size=size, sampling=sampling), clients)  # type: ignore[arg-type]
        for server_round in range(1, rounds + 1):
            for name in drawn.sample(server_round, names(clients)):
                assert server_round - last[name] >= least
                last[name] = server_round

    @pytest.mark.parametrize(
        ("sampling", "size", "apart", "expected"),
        [
            ("cyclic", 3, 3, 10 / 3),
            ("cyclic", 10, 1, 10),
            ("cyclic", 0, 1, 10),
            ("cyclic", 6, 1, 10),
            ("cyclic", 2, 5, 2),
            ("uniform", 3, 1, 3),
            ("balanced", 5, 1, 5),
            ("poisson", 4, 1, 4),
            ("poisson", 0, 1, 10),
        ],
    )
    def test_examples(self, sampling: str, size: int, apart: int, expected: float) -> None:
        """Ten clients: how soon one is asked again, and how many are asked on average."""
        settings = CohortSettings(size=size, sampling=sampling)  # type: ignore[arg-type]
        assert (min_separation(settings, 10), settings.expected_size(10)) == (apart, pytest.approx(expected))

    @given(sizes(), st.integers(1, 6))
    def test_the_expected_size_is_the_mean_over_a_turn(self, n_k: tuple[int, int], turns: int) -> None:
        """Over whole turns of cyclic cohorts, as many clients are asked as the public constant says."""
        clients, size = n_k
        settings, drawn = CohortSettings(size=size, sampling="cyclic"), sampler("cyclic", size)
        rounds = turns * min_separation(settings, clients)
        asked = sum(len(drawn.sample(t, names(clients))) for t in range(1, rounds + 1))
        assert asked / rounds == pytest.approx(settings.expected_size(clients))

    @pytest.mark.parametrize("bound", [min_separation])
    def test_an_impossible_cohort_has_none(self, bound: Any) -> None:
        """A cohort larger than the federation is refused here as well."""
        with pytest.raises(ConfigError):
            bound(CohortSettings(size=11, sampling="cyclic"), 10)


class TestParticipations:
    """`participations` and what it bounds."""

    @given(every, sizes(), seeds, st.integers(0, 30))
    def test_nobody_takes_part_more_often(self, sampling: str, n_k: tuple[int, int], seed: int, rounds: int) -> None:
        """After any number of rounds no client exceeds the bound; balanced counts differ by one at most."""
        clients, size = n_k
        drawn = sampler(sampling, size, seed)
        counts = Counter(dict.fromkeys(names(clients), 0))
        for server_round in range(1, rounds + 1):
            counts.update(drawn.sample(server_round, names(clients)))
        bound = participations(CohortSettings(size=size, sampling=sampling), clients, rounds)  # type: ignore[arg-type]
        assert max(counts.values()) <= bound <= rounds
        if sampling in {"balanced", "cyclic"}:
            assert max(counts.values()) == bound, "the bound is met, so it is not larger than need be"
            assert max(counts.values()) - min(counts.values()) <= 1

    @pytest.mark.parametrize(
        ("sampling", "size", "expected"),
        [
            ("uniform", 0, 7),
            ("balanced", 0, 7),
            ("uniform", 3, 7),
            ("balanced", 3, 3),
            ("balanced", 10, 7),
            ("cyclic", 3, 3),
            ("cyclic", 0, 7),
            ("cyclic", 10, 7),
            ("poisson", 3, 7),
        ],
    )
    def test_examples(self, sampling: str, size: int, expected: int) -> None:
        """Seven rounds with ten clients: all of them, unless three are drawn in a balanced way, or in three groups."""
        assert participations(CohortSettings(size=size, sampling=sampling), 10, 7) == expected  # type: ignore[arg-type]

    @pytest.mark.parametrize("sampling", EVERY)
    def test_an_impossible_cohort_has_no_bound(self, sampling: str) -> None:
        """A cohort larger than the federation is refused here as well: this runs first."""
        with pytest.raises(ConfigError):
            participations(CohortSettings(size=11, sampling=sampling), 10, 7)  # type: ignore[arg-type]


class TestState:
    """`CohortSampler.state` and `restore`."""

    @given(fixed, sizes(), seeds, st.integers(0, 6))
    def test_a_restored_sampler_draws_the_same_cohorts(
        self, sampling: str, n_k: tuple[int, int], seed: int, rounds: int
    ) -> None:
        """A sampler that was saved between two rounds goes on as if nothing had happened."""
        one, other = sampler(sampling, n_k[1], seed), sampler(sampling, n_k[1], seed)
        for server_round in range(1, rounds + 1):
            one.sample(server_round, names(n_k[0]))
        other.restore(one.state())
        for server_round in range(rounds + 1, rounds + 5):
            assert one.sample(server_round, names(n_k[0])) == other.sample(server_round, names(n_k[0]))

    def test_the_state_is_a_copy(self) -> None:
        """Changing what `state` returned does not change the sampler."""
        drawn = sampler("balanced", 1)
        drawn.sample(1, ["a", "b"])
        before = drawn.state()
        drawn.state().clear()
        assert drawn.state() == before
        assert sum(before.values()) == 1

    @pytest.mark.parametrize("sampling", EVERY)
    def test_where_nothing_is_kept_the_state_is_empty(self, sampling: str) -> None:
        """Uniform cohorts and cohorts of everybody need no memory, and refuse one."""
        drawn = sampler(sampling, 1 if sampling in {"uniform", "poisson"} else 0)
        drawn.sample(1, ["a", "b"])
        assert drawn.state() == {}
        drawn.restore({})
        with pytest.raises(RunError, match="do not fit"):
            drawn.restore({"a": 1, "b": 1})

    @pytest.mark.parametrize("state", [{"a": -1, "b": 0}, {"a": 0.5, "b": 1}, {"a": True, "b": 1}, {"a": 3, "b": 1}])
    def test_counts_that_cannot_be_are_refused(self, state: dict[str, Any]) -> None:
        """Negative, broken or unbalanced counts do not come from a balanced sampler; the sampler is unchanged."""
        drawn = sampler("balanced", 1)
        drawn.sample(1, ["a", "b"])
        before = drawn.state()
        with pytest.raises(RunError, match="do not fit"):
            drawn.restore(state)
        assert drawn.state() == before
