"""Cohorts out of very many clients: drawn without looking at all of them, and as balanced as out of few."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import CohortSettings
from common.errors import ConfigError, RunError
from common.names import NumberedNames, SortedNames
from server.cohort import MOST_COUNTED, CohortSampler, participations
from server.turns import Turns, besides

MANY = NumberedNames(10_000_000)
SAMPLINGS = ("uniform", "balanced", "cyclic")


def sampler(sampling: Any, size: int, seed: int = 0) -> CohortSampler:
    return CohortSampler(CohortSettings(size=size, sampling=sampling), seed=seed)


class Watched(SortedNames):
    """Names that count how many of them were looked at."""

    def __init__(self, count: int) -> None:
        self._names = NumberedNames(count)
        self.looked_at = 0

    def place(self, name: object) -> int | None:
        return self._names.place(name)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = self._names[index]
        self.looked_at += 1 if isinstance(found, str) else len(found)
        return found

    def __len__(self) -> int:
        return len(self._names)


class TestTurns:
    """How often everybody took part, where only those ahead are remembered."""

    @given(st.integers(1, 30), st.lists(st.integers(1, 30), max_size=20), st.integers(0, 2**32))
    def test_nobody_takes_part_again_before_everybody_has(self, clients: int, sizes: list[int], seed: int) -> None:
        """After any rounds of any sizes, counts differ by one at most, and a cohort is distinct and ascending."""
        turns, rng, counts = Turns(clients=clients), np.random.default_rng(seed), Counter(range(clients))
        for size in sizes:
            cohort = turns.take(min(size, clients), rng).tolist()
            assert cohort == sorted(set(cohort))
            assert len(cohort) == min(size, clients)
            counts.update(cohort)
            assert max(counts.values()) - min(counts.values()) <= 1
            expected = [place for place in range(clients) if counts[place] == turns.done + 2]
            assert turns.ahead.tolist() == expected

    @given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40), max_size=20))
    def test_ranks_besides_some_numbers_skip_them(self, taken: set[int], ranks: set[int]) -> None:
        """The third number besides 0 and 1 is 4, as counting them shows."""
        free = [n for n in range(200) if n not in taken]
        found = besides(np.array(sorted(taken), np.int64), np.array(sorted(ranks), np.int64))
        assert found.tolist() == [free[rank] for rank in sorted(ranks)]

    def test_every_client_is_as_likely(self) -> None:
        """2,000 draws of 2 in 8: within 6 standard deviations, a false alarm in 10^8 runs."""
        drawn = Counter(
            p for seed in range(2000) for p in Turns(clients=8).take(2, np.random.default_rng(seed)).tolist()
        )
        assert all(abs(drawn[p] - 500) < 6 * (2000 * 0.25 * 0.75) ** 0.5 for p in range(8))


class TestLargePopulation:
    """`CohortSampler` with more clients than it counts."""

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_a_round_looks_at_its_cohort_only(self, sampling: str) -> None:
        """Of ten million names, a hundred."""
        names = Watched(10_000_000)
        cohort = sampler(sampling, 100).sample(3, names)
        assert len(cohort) == 100
        assert cohort == sorted(set(cohort))
        assert names.looked_at == 100

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_a_restored_sampler_draws_the_same_cohorts(self, sampling: str) -> None:
        """Its state names only those who are a turn ahead."""
        one, other = sampler(sampling, 100), sampler(sampling, 100)
        for server_round in range(1, 4):
            one.sample(server_round, MANY)
        state = one.state()
        assert len(state) == {"uniform": 0, "balanced": 302, "cyclic": 2}[sampling]
        other.restore(state)
        assert [one.sample(r, MANY) for r in (4, 5)] == [other.sample(r, MANY) for r in (4, 5)]

    def test_uniform_depends_on_seed_and_round_only(self) -> None:
        """Whatever was drawn before."""
        used = sampler("uniform", 50)
        used.sample(1, MANY)
        assert used.sample(2, MANY) == sampler("uniform", 50).sample(2, MANY)
        assert used.sample(2, MANY) != sampler("uniform", 50, seed=1).sample(2, MANY)

    def test_balanced_takes_everybody_before_anybody_twice(self) -> None:
        """Over a turn and a half, nobody more often than the bound that noise is calibrated to."""
        names = NumberedNames(MOST_COUNTED + 2)
        settings = CohortSettings(size=20_000, sampling="balanced")
        drawn, counts = CohortSampler(settings, seed=0), Counter(names)
        for server_round in range(1, 6):
            counts.update(drawn.sample(server_round, names))
        assert max(counts.values()) - 1 <= participations(settings, len(names), 5) == 2
        assert min(counts.values()) - 1 == 1

    @pytest.mark.parametrize("sampling", ["balanced", "cyclic"])
    def test_other_clients_later_are_refused(self, sampling: str) -> None:
        """Also after a stop: bounds would not hold."""
        drawn = sampler(sampling, 10)
        drawn.sample(1, MANY)
        fewer = NumberedNames(9_000_000)
        with pytest.raises(RunError, match="same clients every round"):
            drawn.sample(2, fewer)
        again = sampler(sampling, 10)
        again.restore(drawn.state())
        with pytest.raises(RunError, match="same clients every round"):
            again.sample(2, fewer)

    def test_the_state_of_a_small_population_is_refused(self) -> None:
        """It counts others."""
        drawn, other = sampler("balanced", 1), sampler("balanced", 1)
        drawn.sample(1, ["a", "b"])
        other.restore(drawn.state())
        with pytest.raises(RunError, match="same clients every round"):
            other.sample(2, MANY)

    def test_a_cohort_above_the_population_is_refused(self) -> None:
        """By its size, before anything is drawn."""
        with pytest.raises(ConfigError, match="only 70000 clients"):
            sampler("uniform", 70_001).sample(1, NumberedNames(70_000))
