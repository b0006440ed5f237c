"""Who takes part in a round, and how often and how soon anybody can again.

Privacy rests on `participations` and `min_separation`, which noise is calibrated to, and they hold for every draw. Only
`poisson` cohorts do more: privacy is amplified by their membership being unpredictable and secret. They are drawn from
the operating system's generator, never from a seed, and a record of them is as secret as the updates are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from common.config import CohortSettings
from common.errors import ConfigError, RunError
from common.privacy.noise import NoiseSource, SecureNoise, poisson_sample

NoiseByRound = Callable[[int], NoiseSource]
"""The source that a round draws from. A fixed one is for simulations that must repeat, also after a stop."""


def participations(settings: CohortSettings, clients: int, rounds: int) -> int:
    """The most rounds of a run that any one client can take part in.

    Uniform and Poisson sampling may draw the same client every round: `rounds`. So does a cohort of everybody. In
    cyclic cohorts a client's group is asked every g-th round, g being the number of groups: ceil(r / g), which the
    first group meets. For balanced sampling of k out of n clients over r rounds it is ceil(r*k/n), because at all times
    the counts of any two clients differ by at most one. Proof by induction: let the counts lie in {m, m+1}, as they do
    at the start. A round takes the k lowest. If at least k clients are at m, only such clients move, to m+1. Otherwise
    all clients at m move to m+1 and some at m+1 move to m+2, and nobody is left at m. Either way the counts again lie
    in two neighbouring values. Now let M be the highest count after r rounds, which sum to r*k. One client has M and
    all others at least M-1, so r*k >= n*(M-1) + 1, hence r*k/n > M-1, hence ceil(r*k/n) >= M.

    Args:
        settings: Size and kind of the cohorts.
        clients: Number of clients n that `CohortSampler.sample` is shown every round, 1 or more.
        rounds: Number of rounds r, 0 or more.

    Raises:
        ConfigError: The cohort is larger than the number of clients.
    """
    _check_size(settings, clients)
    if settings.size == 0 or settings.sampling in {"uniform", "poisson"}:
        return rounds
    if settings.sampling == "cyclic":
        return -(-rounds // groups(settings, clients))
    return -(-rounds * settings.size // clients)


def min_separation(settings: CohortSettings, clients: int) -> int:
    """The fewest rounds from one participation of a client to its next: 1 where it can be asked twice in a row.

    Only cyclic cohorts keep clients apart, by the number of groups. Balanced ones do not: a client can be the last of
    one turn and the first of the next.

    Raises:
        ConfigError: The cohort is larger than the number of clients.
    """
    _check_size(settings, clients)
    return groups(settings, clients) if settings.sampling == "cyclic" else 1


def groups(settings: CohortSettings, clients: int) -> int:
    """How many cyclic cohorts there are before the first comes again: as many of at least `size` clients as there can
    be. Clients that are left over join them, at most one more to each than to any other.
    """
    return clients // settings.size if settings.size else 1


class Sampler(Protocol):
    """Decides who is asked each round."""

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """The round's cohort: sorted names out of `clients`."""

    def state(self) -> dict[str, int]:
        """What a checkpoint has to keep."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Take up a checkpoint's state."""


class CohortSampler:
    """Draws cohorts. Uniform and cyclic ones depend on seed and round only; balanced ones also on who took part before;
    Poisson cohorts on nothing that anybody could know.

    Guarantee:
        But for Poisson cohorts, equal settings, seed, round, clients and state give equal cohorts, in whatever order
        the clients are named. After r rounds nobody took part more often than `participations` says, nor sooner again
        than `min_separation` does.
    """

    def __init__(self, settings: CohortSettings, *, seed: int, noise: NoiseByRound | None = None) -> None:
        """Prepare.

        Args:
            settings: Size and kind of the cohorts.
            seed: Decides uniform and balanced draws.
            noise: Decides Poisson draws; None takes a fresh secure source. One that somebody can predict voids the
                amplification that such cohorts are for.
        """
        self._settings = settings
        self._seed = seed
        self._noise = noise
        self._counts: dict[str, int] = {}

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """The cohort of one round, sorted by name; it counts as having taken part, whoever answers.

        Args:
            server_round: Counts from 1.
            clients: Names of all clients of the run, also of those that are away now: they simply do not answer.

        Edge cases: A Poisson cohort may be empty, and the round still takes place.

        Raises:
            ConfigError: The cohort is larger than the number of clients, or a name occurs twice.
            RunError: Balanced or cyclic sampling was shown other clients in an earlier round, so that its bounds would
                not hold.
        """
        names = sorted(clients)
        if len(set(names)) != len(names):
            raise ConfigError("two clients have the same name", hint="give every site a name of its own")
        _check_size(self._settings, len(names))
        size = self._settings.size
        if size == 0:
            return names
        if self._settings.sampling == "poisson":
            return self._poisson(server_round, names)
        if self._settings.sampling == "uniform":
            order = self._order(server_round, len(names))
            return [names[i] for i in sorted(order[:size])]
        counts = self._counts or dict.fromkeys(names, 0)
        if counts.keys() != set(names):
            raise RunError(
                f"{self._settings.sampling} cohorts need the same clients every round: how often each takes part "
                "bounds what it spends",
                hint="name all clients of the run every round, or use cohort.sampling = 'uniform'",
            )
        if self._settings.sampling == "cyclic":
            total = groups(self._settings, len(names))
            group = (server_round - 1) % total
            cohort = names[group * len(names) // total : (group + 1) * len(names) // total]
        else:
            taken = np.array([counts[name] for name in names])
            order = self._order(server_round, len(names))
            cohort = [names[i] for i in sorted(np.lexsort((order, taken))[:size])]
        self._counts = counts | {name: counts[name] + 1 for name in cohort}
        return cohort

    def _order(self, server_round: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, server_round]).permutation(count)

    def _poisson(self, server_round: int, names: Sequence[str]) -> list[str]:
        """Each name by itself with probability size / clients."""
        if self._noise is None:
            secure = SecureNoise()
            self._noise = lambda _: secure
        rate = self._settings.size / len(names)
        return [names[i] for i in poisson_sample(len(names), rate=rate, source=self._noise(server_round)).tolist()]

    def state(self) -> dict[str, int]:
        """How often each client took part; empty before the first balanced or cyclic round, and where nothing is kept.

        A resumed run draws Poisson cohorts anew: nothing could be kept of them that would not make them predictable.
        """
        return dict(self._counts)

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            RunError: The state cannot come from these settings. The sampler is unchanged.
        """
        stateless = self._settings.size == 0 or self._settings.sampling in {"uniform", "poisson"}
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
