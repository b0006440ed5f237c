"""The plan of a private run: one frozen object from which sampler, clipper, noise and ledger take their parameters.

Everything in it is public: it follows from the run's configuration, the number of clients and the size of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from common.errors import PrivacyError
from common.guarantee import ADDED_OR_REMOVED, UPDATE_REPLACED
from common.privacy import matrix
from common.privacy.accounting.accountant import ORDERS, Budget, spent
from common.privacy.bookkeeping.rounding import SUMMATION_ERROR
from common.privacy.clipping import Clipper, make_clipper
from common.privacy.distributed import Mechanism
from common.privacy.events import DistributedNoise, MatrixGaussian, PrivacyEvent, SampledGaussian, Trust, Unit
from common.privacy.noise import (
    DISTANCE_PER_DRAW,
    GRID_STDDEV,
    NoiseSource,
    noise_stddev_for,
    poisson_sample,
    rounded_sensitivity,
)
from common.privacy.shares import Shares, sum_event

_COUNT_NOISE = 0.05
"""Noise on the count that adapts the clipping norm, as a share of the expected number of contributions (Andrew et al.
2021, section 2.3); more where the sum's noise would otherwise have to grow by over 3 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyPlan:
    """What is released over a whole run, and what that costs.

    Attributes:
        run: Digest of the run's configuration.
        unit: Whom it protects: one example at each client (noise added there, trust in nobody), or a whole client
            (noise added by the coordinator, which is trusted, or by all clients of a sum, where there are `shares`).
        mechanism: Whether noise is independent or correlated over rounds; unit client only.
        clipping: How contributions are bounded.
        clipping_norm: L2 bound on one contribution: an example's gradient, or a client's update; the first one where
            clipping adapts.
        target_quantile: Adaptive clipping: share of contributions that should lie within the norm.
        clipping_learning_rate: Adaptive clipping: how fast the norm follows.
        noise_multiplier: Noise over sensitivity of one release, sum and count together; of the whole run where the
            mechanism is `matrix`. Where there are `shares` it is the noise of the fewest honest ones.
        dimensions: Trainable parameters of the model: each is rounded to the noise's grid. Where there are `shares` all
            values of the model's arrays, since all of them are in the sum.
        sampling_rate: Poisson rate of examples in a step, or of clients in a cohort (1 where no amplification is
            claimed); public.
        denominator: Public constant that divides the noised sum: expected batch, or expected cohort.
        local_steps: Sums that one participation releases.
        clients: Clients of the run, where that number decides anything: unit `client`.
        rounds: Rounds of the run.
        participations: Most rounds in which one client takes part.
        min_separation: Fewest rounds from one participation of a client to its next.
        coefficients: First column of the matrix that correlates the noise; (1,) for independent noise.
        budget: Ceiling of this run: target epsilon (or what the given noise costs), delta, order of the accounting.
        shares: How noise is divided among the clients of a sum, where they add it (distributed noise); else None.
    """

    run: str
    unit: Unit
    mechanism: Literal["independent", "matrix"]
    clipping: Literal["flat", "per-layer", "adaptive"]
    clipping_norm: float
    target_quantile: float
    clipping_learning_rate: float
    noise_multiplier: float
    dimensions: int
    sampling_rate: float
    denominator: float
    local_steps: int
    clients: int
    rounds: int
    participations: int
    min_separation: int
    coefficients: tuple[float, ...]
    budget: Budget
    shares: Shares | None = None

    @property
    def distributed(self) -> Mechanism | None:
        """How each client rounds its update and which noise it adds; None where noise is not distributed."""
        if self.shares is None:
            return None
        return self.shares.mechanism_for(
            clipping_norm=self.clipping_norm, noise_multiplier=self.noise_multiplier, dimensions=self.dimensions
        )

    @property
    def central(self) -> bool:
        """Whether the coordinator adds the noise."""
        return self.unit == "client" and self.shares is None

    @property
    def trust(self) -> Trust:
        """Whom the guarantee does not hold against; see `events`."""
        return "cohort" if self.shares else "coordinator" if self.unit == "client" else "nobody"

    @property
    def relation(self) -> str:
        """Which data sets are neighbours."""
        return UPDATE_REPLACED if self.shares else ADDED_OR_REMOVED

    @property
    def count_noise_stddev(self) -> float | None:
        """Noise on the count that adapts the clipping norm; such that 1/2 is a multiple of its grid."""
        if self.clipping != "adaptive":
            return None
        wanted = max(_COUNT_NOISE * self.denominator, 2 * self.noise_multiplier)
        steps = max(1, math.floor(0.5 * GRID_STDDEV / wanted))
        return 0.5 * GRID_STDDEV / steps

    @property
    def sensitivity(self) -> float:
        """L2 distance of the rounded sums of neighbours: of one round, or of the whole run for `matrix`."""
        if (shared := self.distributed) is not None:
            return shared.granularity * math.sqrt(shared.l2_squared)
        dimensions, factor = self._rows * self.dimensions, self._factor
        return rounded_sensitivity(
            self.clipping_norm * factor,
            summation_error=SUMMATION_ERROR,
            noise_stddev=self.noise_stddev,
            dimensions=dimensions,
        )

    @property
    def noise_stddev(self) -> float:
        """Noise on each coordinate of a sum of contributions clipped to `clipping_norm`; grows with the norm."""
        if (shared := self.distributed) is not None:
            return shared.granularity * math.sqrt(shared.variance)
        multiplier, count = self.noise_multiplier, self.count_noise_stddev
        if count is not None:  # the pair of sum and count costs what `noise_multiplier` does: Andrew et al., theorem 1
            multiplier = (multiplier**-2 - (0.5 / count) ** 2) ** -0.5
        return noise_stddev_for(
            multiplier,
            self.clipping_norm * self._factor,
            summation_error=SUMMATION_ERROR,
            dimensions=self._rows * self.dimensions,
        )

    @property
    def _factor(self) -> float:
        """Sensitivity of the correlated sums over a run to contributions of norm 1."""
        if self.mechanism == "independent":
            return 1.0
        return matrix.sensitivity(
            self.coefficients,
            rounds=self.rounds,
            participations=self.participations,
            min_separation=self.min_separation,
        )

    @property
    def _rows(self) -> int:
        """Vectors that one release rounds to the grid."""
        return self.rounds if self.mechanism == "matrix" else 1

    def clipper(self, norm: float | None = None) -> Clipper:
        """What bounds each contribution; `norm` is the present one where clipping adapts."""
        return make_clipper(
            self.clipping,
            norm=self.clipping_norm if norm is None else norm,
            denominator=self.denominator,
            target_quantile=self.target_quantile,
            learning_rate=self.clipping_learning_rate,
            count_noise_stddev=self.count_noise_stddev,
        )

    def sample(self, count: int, source: NoiseSource) -> Tensor:
        """int64[k]: which of `count` examples (or entities) a step takes."""
        return poisson_sample(count, rate=self.sampling_rate, source=source)

    def event(self, server_round: int) -> PrivacyEvent:
        """What one participation releases, as a site's ledger records it: counted for examples."""
        if self.mechanism == "matrix":
            return self._whole_run(server_round)
        if (shared := self._shared(server_round)) is not None:
            return shared
        return self._sum(server_round, rate=self.sampling_rate if self.unit == "example" else 1.0)

    def central_event(self, server_round: int) -> PrivacyEvent:
        """What the coordinator records before it adds a round's noise: counted for clients.

        Independent noise over cohorts that nobody draws at random is one release of the whole run: a client takes part
        `participations` times, not in every round. Each round is recorded all the same, so that none is released twice.

        Raises:
            PrivacyError: The coordinator adds no noise.
        """
        if not self.central:
            raise PrivacyError("the coordinator of this run adds no noise and records none")
        return self._sum(server_round, rate=self.sampling_rate) if self._amplified else self._whole_run(server_round)

    @property
    def _amplified(self) -> bool:
        return self.unit == "client" and self.sampling_rate < 1

    def _sum(self, server_round: int, *, rate: float) -> SampledGaussian:
        draws = self.local_steps * (self.dimensions + (self.clipping == "adaptive"))
        return SampledGaussian(
            unit=self.unit,
            trust=self.trust,
            clipping_norm=self.clipping_norm,
            sensitivity=self.sensitivity,
            noise_stddev=self.noise_stddev,
            count_noise_stddev=self.count_noise_stddev,
            sampling_rate=rate,
            steps=self.local_steps,
            distance=draws * DISTANCE_PER_DRAW,
            run=self.run,
            server_round=server_round,
        )

    def _whole_run(self, server_round: int) -> MatrixGaussian:
        """All rounds as one release; with independent noise a client's contributions to different rounds are apart."""
        stddev, sensitivity = self.noise_stddev, self.sensitivity
        if self.mechanism == "independent":  # sums and counts of all rounds, in units of the joint multiplier
            stddev, sensitivity = self.noise_multiplier * sensitivity, math.sqrt(self.participations) * sensitivity
        return MatrixGaussian(
            unit=self.unit,
            trust=self.trust,
            clipping_norm=self.clipping_norm,
            sensitivity=sensitivity,
            noise_stddev=stddev,
            rounds=self.rounds,
            participations=self.participations,
            min_separation=self.min_separation,
            distance=self.rounds * (self.dimensions + 1) * DISTANCE_PER_DRAW,
            run=self.run,
            server_round=server_round,
        )

    def _shared(self, server_round: int, *, steps: int = 1) -> DistributedNoise | None:
        """`steps` sums of clients that add the noise themselves."""
        if self.shares is None or (mechanism := self.distributed) is None:
            return None
        return sum_event(mechanism, self.shares, run=self.run, server_round=server_round, steps=steps)

    def release(self, rounds: int) -> list[PrivacyEvent]:
        """All that is released to or about one unit that took part in `rounds` rounds."""
        if rounds == 0:
            return []
        if (shared := self._shared(1, steps=rounds)) is not None:
            return [shared]
        if self.unit == "client" and not self._amplified:
            participations = min(rounds, self.participations)
            if self.mechanism == "independent":
                return [replace(self, participations=participations).central_event(1)]
            return [self._whole_run(1)]
        each = self._sum(1, rate=self.sampling_rate)
        return [replace(each, steps=each.steps * rounds, distance=each.distance * rounds)]

    def epsilon_after(self, rounds: int) -> float:
        """Epsilon of one unit after `rounds` of its rounds, by the accounting that gates the run."""
        return spent(self.release(rounds), budget=self.budget, unit=self.unit)

    @property
    def site_budget(self) -> Budget:
        """What the run costs the examples of one site: the budget of a site that lives for this run only.

        Raises:
            PrivacyError: It is infinite.
        """
        if self.unit == "example":
            return self.budget
        events = [self.event(r + 1) for r in range(self.participations)]
        opened = [Budget(epsilon=self.budget.epsilon, delta=self.budget.delta, order=order) for order in ORDERS]
        cheapest = min(opened, key=lambda budget: spent(events, budget=budget))
        cost = spent(events, budget=cheapest)
        if not math.isfinite(cost):
            raise PrivacyError(
                "the run hides no example at a site: that one's epsilon is infinite",
                hint="lower privacy.target_epsilon, or raise privacy.noise_multiplier",
            )
        return replace(cheapest, epsilon=cost * (1 + 1e-9))
