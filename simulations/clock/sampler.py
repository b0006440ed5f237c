"""Cohorts out of the devices that are there now, without looking at all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from common.config import CohortSettings
from common.config.participation import check_size
from common.errors import ConfigError
from common.names import SortedNames, sorted_names
from simulations.clock.timing import Timing
from simulations.clock.virtual import VirtualClock

_FEW: Final = 1 << 16
"""Of so many clients all are put in an order, as `CohortSampler` does; of more, single ones are drawn."""
_BLOCK: Final = 1024


class AvailableSampler:
    """Draws uniformly among the devices that are there; waits on the clock where none is. A `server.cohort.Sampler`.

    A cohort depends on seed, round and moment alone. Where all devices are there it is, up to 65,536 clients, the one
    that `CohortSampler` draws.

    With privacy this is sound for uniform cohorts because nothing is claimed for them: noise is calibrated as if each
    client could take part in every round. Every other kind promises something about who is asked how often or how
    unpredictably, and a device that is away breaks it: balanced and cyclic cohorts could no longer keep their turns,
    and a Poisson cohort out of fewer clients would amplify less than its rate says.
    """

    def __init__(
        self,
        settings: CohortSettings,
        *,
        seed: int,
        timing: Timing,
        clock: VirtualClock,
        place: Callable[[str], int],
    ) -> None:
        """Prepare.

        Args:
            settings: Size of the cohorts.
            seed: `seeds.cohort`.
            timing: What device each client is.
            clock: Says what moment it is; waits where nobody is there.
            place: A client's place in the population.

        Raises:
            ConfigError: Cohorts are not uniform.
        """
        if settings.sampling != "uniform":
            raise ConfigError(
                f"`cohort.sampling` is {settings.sampling}, which plans who is asked, and devices are away at times",
                hint="set cohort.sampling = 'uniform'",
            )
        self._settings, self._seed, self._timing, self._clock, self._place = settings, seed, timing, clock, place

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:
        """The round's cohort, sorted by name: fewer than asked for where fewer are there.

        Where nobody is there the clock moves on to when somebody is; but while clients are still at work, in
        asynchronous rounds, the cohort is empty: their answers come first.

        Raises:
            ConfigError: The cohort is larger than the number of clients, or a name occurs twice.
        """
        try:
            names = sorted_names(clients)
        except ValueError as e:
            raise ConfigError("two clients have the same name", hint="give every client a name of its own") from e
        check_size(self._settings, len(names))
        found = self._draw(server_round, names)
        if not found and not self._clock.launches:
            self._clock.advance(min(self._begins(name) for name in names))
            found = self._draw(server_round, names)
        return [names[i] for i in sorted(found)]

    def state(self) -> dict[str, int]:
        """Nothing: the clock keeps the moment."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Nothing to do."""

    def _draw(self, server_round: int, names: SortedNames) -> list[int]:
        """Places of those who are asked."""
        size = self._settings.asked() or len(names)
        found: list[int] = []
        for i in _order(self._seed, server_round, len(names), all_of_them=size == len(names)):
            if len(found) == size:
                break
            if self._there(names[i]):
                found.append(i)
        return found

    def _there(self, name: str) -> bool:
        return self._timing.devices.presence(self._place(name), name).ends(self._clock.now) is not None

    def _begins(self, name: str) -> float:
        return self._timing.devices.presence(self._place(name), name).begins(self._clock.now)


def _order(seed: int, server_round: int, count: int, *, all_of_them: bool) -> Iterator[int]:
    """Every number below `count` once, in uniformly random order; the first ones cost nothing of the others."""
    drawn = np.random.default_rng([seed, server_round])
    if all_of_them:
        yield from range(count)
        return
    if count <= _FEW:
        yield from drawn.permutation(count).tolist()
        return
    seen: set[int] = set()
    while len(seen) < count // 8:
        for i in drawn.integers(count, size=_BLOCK).tolist():
            if i not in seen:
                seen.add(i)
                yield i
    yield from (i for i in drawn.permutation(count).tolist() if i not in seen)
