"""Who takes part in a round, and how often and how soon anybody can again.

Privacy rests on `participations` and `min_separation`, which noise is calibrated to, and they hold for every draw. Only
`poisson` cohorts do more: privacy is amplified by their membership being unpredictable and secret. They are drawn from
the operating system's generator, never from a seed, and a record of them is as secret as the updates are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import numpy as np

from common.config import CohortSettings
from common.config.participation import check_size, groups
from common.config.participation import min_separation as min_separation  # noqa: PLC0414 - passed on
from common.config.participation import participations as participations  # noqa: PLC0414 - passed on
from common.errors import ConfigError, RunError
from common.names import SortedNames, sorted_names
from common.privacy.noise import NoiseSource, SecureNoise, poisson_sample
from server.turns import Turns, drawn

NoiseByRound = Callable[[int], NoiseSource]
"""The source that a round draws from. A fixed one is for simulations that must repeat, also after a stop."""


MOST_COUNTED: Final = 2**16
"""Among more clients than this neither every name nor every client's count is looked at; a round draws otherwise."""


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
        than `min_separation` does. Of names that are known to be sorted, a round looks at those of its cohort only; of
        more than `MOST_COUNTED` it remembers those who are a turn ahead.
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
        self._turns: Turns | None = None
        self._names: SortedNames | None = None

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
        try:
            names = sorted_names(clients)
        except ValueError as e:
            raise ConfigError("two clients have the same name", hint="give every site a name of its own") from e
        check_size(self._settings, len(names))
        size = self._settings.asked()
        if size == 0:
            return list(names)
        if self._settings.sampling == "poisson":
            return self._poisson(server_round, names)
        if len(names) > MOST_COUNTED:
            return self._of_many(server_round, names, size)
        if self._settings.sampling == "uniform":
            order = self._order(server_round, len(names))
            return [names[i] for i in sorted(order[:size])]
        counts = self._counts or dict.fromkeys(names, 0)
        if counts.keys() != set(names):
            raise self._others()
        if self._settings.sampling == "cyclic":
            cohort = self._group(server_round, names)
        else:
            taken = np.array([counts[name] for name in names])
            order = self._order(server_round, len(names))
            cohort = [names[i] for i in sorted(np.lexsort((order, taken))[:size])]
        self._counts = counts | {name: counts[name] + 1 for name in cohort}
        return cohort

    def _of_many(self, server_round: int, names: SortedNames, size: int) -> list[str]:
        """A cohort out of so many clients that only few of them can be looked at."""
        rng = np.random.default_rng([self._seed, server_round])
        if self._settings.sampling == "uniform":
            return [names[i] for i in drawn(len(names), size, rng).tolist()]
        turns = self._turns or Turns(clients=len(names))
        if self._counts:
            known = Turns.restored(self._counts, names) if Turns.saved(self._counts) else None
            if known is None:
                raise self._others()
            turns, self._counts = known, {}
        if turns.clients != len(names):
            raise self._others()
        self._turns, self._names = turns, names
        if self._settings.sampling == "cyclic":
            return self._group(server_round, names)
        return [names[i] for i in turns.take(size, rng).tolist()]

    def _group(self, server_round: int, names: SortedNames) -> list[str]:
        """The group whose turn it is."""
        total = groups(self._settings, len(names))
        group = (server_round - 1) % total
        return list(names[group * len(names) // total : (group + 1) * len(names) // total])

    def _others(self) -> RunError:
        return RunError(
            f"{self._settings.sampling} cohorts need the same clients every round: how often each takes part bounds "
            "what it spends",
            hint="name all clients of the run every round, or use cohort.sampling = 'uniform'",
        )

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
        Of more than `MOST_COUNTED` clients, who is a turn ahead of the others.

        A resumed run draws Poisson cohorts anew: nothing could be kept of them that would not make them predictable.
        """
        if self._turns is not None and self._names is not None:
            return self._turns.state(self._names)
        return dict(self._counts)

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            RunError: The state cannot come from these settings. The sampler is unchanged.
        """
        stateless = self._settings.size == 0 or self._settings.sampling in {"uniform", "poisson"}
        counts = state.values()
        unequal = any(type(n) is not int or n < 0 for n in counts) or (
            not Turns.saved(state) and max(counts, default=0) - min(counts, default=0) > 1
        )
        if unequal or (state and stateless):
            raise RunError(
                "the saved participation counts do not fit these cohort settings",
                hint="resume with the configuration that wrote the checkpoint, or start a new run",
            )
        self._counts, self._turns, self._names = dict(state), None, None
