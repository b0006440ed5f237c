"""Who takes part in a round, and how often anybody can.

Nothing here is secret and no privacy rests on a draw being unpredictable: amplification by sampling of cohorts is never
claimed. What privacy does rest on is `participations`, the ceiling that noise is calibrated to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from common.config import CohortSettings
from common.errors import ConfigError, RunError


def participations(settings: CohortSettings, clients: int, rounds: int) -> int:
    """The most rounds of a run that any one client can take part in.

    Uniform sampling may draw the same client every round: `rounds`. So does a cohort of everybody. For balanced
    sampling of k out of n clients over r rounds it is ceil(r*k/n), because at all times the counts of any two clients
    differ by at most one. Proof by induction: let the counts lie in {m, m+1}, as they do at the start. A round takes
    the k lowest. If at least k clients are at m, only such clients move, to m+1. Otherwise all clients at m move to
    m+1 and some at m+1 move to m+2, and nobody is left at m. Either way the counts again lie in two neighbouring
    values. Now let M be the highest count after r rounds, which sum to r*k. One client has M and all others at least
    M-1, so r*k >= n*(M-1) + 1, hence r*k/n > M-1, hence ceil(r*k/n) >= M.

    Args:
        settings: Size and kind of the cohorts.
        clients: Number of clients n that `CohortSampler.sample` is shown every round, 1 or more.
        rounds: Number of rounds r, 0 or more.

    Raises:
        ConfigError: The cohort is larger than the number of clients.
    """
    _check_size(settings, clients)
    if settings.size == 0 or settings.sampling == "uniform":
        return rounds
    return -(-rounds * settings.size // clients)


class Sampler(Protocol):
    """Decides who is asked each round."""

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """The round's cohort: sorted names out of `clients`."""

    def state(self) -> dict[str, int]:
        """What a checkpoint has to keep."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Take up a checkpoint's state."""


class CohortSampler:
    """Draws cohorts. Uniform draws depend on seed and round only; balanced ones also on who took part before.

    Guarantee:
        Equal settings, seed, round, clients and state give equal cohorts, in whatever order the clients are named.
        After r balanced rounds nobody took part more often than `participations` says.
    """

    def __init__(self, settings: CohortSettings, *, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._counts: dict[str, int] = {}

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """The cohort of one round, sorted by name. Balanced sampling counts it as taken part, whoever answers.

        Args:
            server_round: Counts from 1.
            clients: Names of all clients of the run, also of those that are away now: they simply do not answer.

        Raises:
            ConfigError: The cohort is larger than the number of clients, or a name occurs twice.
            RunError: Balanced sampling was shown other clients in an earlier round, so that its bound would not hold.
        """
        names = sorted(clients)
        if len(set(names)) != len(names):
            raise ConfigError("two clients have the same name", hint="give every site a name of its own")
        _check_size(self._settings, len(names))
        size = self._settings.size
        if size == 0:
            return names
        generator = np.random.default_rng([self._seed, server_round])
        order = generator.permutation(len(names))
        if self._settings.sampling == "uniform":
            return [names[i] for i in sorted(order[:size])]
        counts = self._counts or dict.fromkeys(names, 0)
        if counts.keys() != set(names):
            raise RunError(
                "balanced cohorts need the same clients every round: how often each takes part bounds what it spends",
                hint="name all clients of the run every round, or use cohort.sampling = 'uniform'",
            )
        taken = np.array([counts[name] for name in names])
        cohort = [names[i] for i in sorted(np.lexsort((order, taken))[:size])]
        self._counts = counts | {name: counts[name] + 1 for name in cohort}
        return cohort

    def state(self) -> dict[str, int]:
        """How often each client took part; empty before the first balanced round, and where nothing is kept."""
        return dict(self._counts)

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            RunError: The state cannot come from these settings. The sampler is unchanged.
        """
        stateless = self._settings.size == 0 or self._settings.sampling == "uniform"
        counts = state.values()
        unequal = (
            any(type(n) is not int or n < 0 for n in counts) or max(counts, default=0) - min(counts, default=0) > 1
        )
        if unequal or (state and stateless):
            raise RunError(
                "the saved participation counts do not fit these cohort settings",
                hint="resume with the configuration that wrote the checkpoint, or start a new run",
            )
        self._counts = dict(state)


def _check_size(settings: CohortSettings, clients: int) -> None:
    """A cohort has to fit the clients there are."""
    if clients < 1:
        raise ConfigError("there are no clients to draw a cohort from", hint="add sites, or raise data.clients")
    if settings.size > clients:
        raise ConfigError(
            f"cohort.size is {settings.size}, but there are only {clients} clients",
            hint=f"set it to {clients} or less; 0 asks all",
        )
