"""How noise is divided among the sites of a sum, where they add it themselves: for the fewest honest ones, never for
those that happen to answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.participation import honest_in_sum
from common.config.settings import RunConfig
from common.errors import PrivacyError
from common.privacy.distributed import Mechanism, mechanism_of
from common.privacy.events import DistributedNoise, SharedNoise


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Who adds what to a sum.

    Attributes:
        mechanism: Distribution of a share of noise.
        bits: Size of the ring that sums are taken in.
        clients: Most members of a sum; the grid leaves room for as many.
        honest: Fewest of them that can be counted on: their shares together are the noise.
        colluding: Most of them that may tell somebody who looks what they know.
    """

    mechanism: SharedNoise
    bits: int
    clients: int
    honest: int
    colluding: int

    def mechanism_for(self, *, clipping_norm: float, noise_multiplier: float, dimensions: int) -> Mechanism:
        """Grid and noise of each client.

        Args:
            clipping_norm: L2 bound on one client's update.
            noise_multiplier: Noise of the honest ones over the sensitivity of the rounded sum.
            dimensions: Values of an update.

        Raises:
            PrivacyError: The ring is too small for them.
        """
        return mechanism_of(
            self.mechanism,
            bits=self.bits,
            clients=self.clients,
            honest=self.honest,
            clipping_norm=clipping_norm,
            noise_multiplier=noise_multiplier,
            dimensions=dimensions,
        )


def shares_of(config: RunConfig, *, clients: int) -> Shares | None:
    """The shares of a run; None where no noise is distributed.

    Noise of colluding clients counts for nothing, however much of it there is.

    Args:
        config: The run.
        clients: How many take part.

    Raises:
        PrivacyError: Not even all clients together are enough for a sum.
    """
    if not config.distributed:
        return None
    settings, honest = config.secagg, honest_in_sum(config)
    fewest, most = honest + settings.colluding, config.cohort.asked() or clients
    if settings.group_size:  # groups of a roster differ by at most one, and there is one more only for that many more
        most = min(most, 2 * settings.group_size - 1)
    if most < fewest:
        raise PrivacyError(
            f"a sum of {fewest} updates or more cannot come of {most} clients",
            hint="lower secagg.honest, secagg.colluding or cohort.min_survivors, or name more clients",
        )
    return Shares(
        mechanism=settings.noise,
        bits=settings.bits,
        clients=most,
        honest=honest,
        colluding=settings.colluding,
    )


def sum_event(mechanism: Mechanism, shares: Shares, *, run: str, server_round: int, steps: int = 1) -> DistributedNoise:
    """What each member of a sum writes into its own ledger first; of `steps` sums that are alike."""
    return DistributedNoise(
        unit="client",
        trust="cohort",
        mechanism=mechanism.noise,
        clipping_norm=mechanism.clipping_norm,
        granularity=mechanism.granularity,
        l2_squared=mechanism.l2_squared,
        l1=mechanism.l1,
        variance=mechanism.variance,
        shares=mechanism.honest,
        colluding=shares.colluding,
        dimensions=mechanism.draws,
        steps=steps,
        distance=steps * mechanism.distance,
        run=run,
        server_round=server_round,
    )
