"""What was released, as frozen records. They say what happened; only `accountant` says what it costs.

All quantities are public: they come from the run's plan. `unit` names whom the mechanism protects, `trust` whom it
protects them from: with `nobody` noise was added before anything left the site, with `coordinator` the coordinator sees
what it adds noise to. With `cohort` each site of a sum adds a share of its noise and only the sum is seen, so the noise
is enough while no more of them than the event says help whoever looks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from common.errors import LedgerError

Unit = Literal["example", "client"]
Trust = Literal["nobody", "coordinator", "cohort"]
SharedNoise = Literal["skellam", "discrete-gaussian"]
"""Noise on integers that several parties can add up: a sum of such shares is, or nearly is, of the same kind."""

VERSION = 2
_UNITS, _TRUSTS = ("example", "client"), ("nobody", "coordinator")
_SHARED = ("skellam", "discrete-gaussian")
_MOST = 1 << 100
"""Whole numbers beyond this say nothing, and would overflow where they are counted with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledGaussian:
    """`steps` noised sums of clipped contributions, each over a fresh Poisson sample of the units.

    Attributes:
        unit: Whom it protects: `example` (one example, or one entity where the data set has entities) or `client`.
        trust: `coordinator` where the coordinator adds the noise.
        clipping_norm: L2 bound on one unit's contribution; the first one where clipping adapts.
        sensitivity: L2 distance of the rounded sums of neighbouring samples: `clipping_norm` plus what rounding to the
            noise's grid and summing in floating point can add.
        noise_stddev: Standard deviation of the noise on each coordinate; absolute.
        count_noise_stddev: Standard deviation of the noise on the count (of b - 1/2) that adapts the clipping norm, or
            None where nothing adapts. Sum and count are one joint release.
        sampling_rate: Probability with which each unit entered each sum; public.
        steps: Number of sums.
        distance: Total variation distance of all drawn noise from the exact discrete Gaussian; goes into delta.
        run: Digest of the run's configuration.
        server_round: The round, from 1.
    """

    KIND: ClassVar[str] = "sampled-gaussian"
    unit: Unit
    trust: Trust
    clipping_norm: float
    sensitivity: float
    noise_stddev: float
    count_noise_stddev: float | None
    sampling_rate: float
    steps: int
    distance: float
    run: str
    server_round: int

    @property
    def noise_multiplier(self) -> float:
        """Noise over sensitivity of sum and count together (Andrew et al. 2021, theorem 1)."""
        inverse_square = (self.sensitivity / self.noise_stddev) ** 2
        if self.count_noise_stddev is not None:
            inverse_square += (0.5 / self.count_noise_stddev) ** 2
        return 1.0 / math.sqrt(inverse_square)

    def check(self) -> None:
        """Raise LedgerError if it cannot be counted."""
        counts = () if self.count_noise_stddev is None else (self.count_noise_stddev,)
        _require(
            self.unit in _UNITS
            and self.trust in _TRUSTS
            and _positive(self.clipping_norm, self.sensitivity, self.noise_stddev, self.sampling_rate, *counts)
            and self.sensitivity >= self.clipping_norm
            and self.sampling_rate <= 1
            and _count(self.steps)
            and _error(self.distance)
            and _place(self.run, self.server_round)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixGaussian:
    """All rounds of a run under noise that is correlated over rounds (DP-FTRL, matrix factorisation): one release.

    A site writes one for each of its participations, and the coordinator one for each round, alike but for the round,
    so that the schedule can be checked. They count once: together they are the release.

    Attributes:
        unit: As in `SampledGaussian`.
        trust: As in `SampledGaussian`.
        clipping_norm: L2 bound on one unit's contribution to one round.
        sensitivity: L2 distance, over all rounds together, of what the noise is added to, for any participation that
            the schedule allows; rounding included.
        noise_stddev: Standard deviation of the independent noise that is then correlated; absolute.
        rounds: Rounds that the release covers.
        participations: Most rounds of one unit.
        min_separation: Fewest rounds from one participation of a unit to its next.
        distance: As in `SampledGaussian`.
        run: Digest of the run's configuration.
        server_round: The participation that it was written for.
    """

    KIND: ClassVar[str] = "matrix-gaussian"
    unit: Unit
    trust: Trust
    clipping_norm: float
    sensitivity: float
    noise_stddev: float
    rounds: int
    participations: int
    min_separation: int
    distance: float
    run: str
    server_round: int

    @property
    def noise_multiplier(self) -> float:
        """Noise over sensitivity of the whole run."""
        return self.noise_stddev / self.sensitivity

    def check(self) -> None:
        """Raise LedgerError if it cannot be counted."""
        _require(
            self.unit in _UNITS
            and self.trust in _TRUSTS
            and _positive(self.clipping_norm, self.sensitivity, self.noise_stddev)
            and _count(self.rounds, self.participations, self.min_separation)
            and _error(self.distance)
            and _place(self.run, self.server_round)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedNoise:
    """`steps` sums that are seen as sums only, to which each client added its share of discrete noise beforehand.

    Neighbours: one client's update is replaced by zero; who is in the sum stays the same, and so does all noise.

    A sum is counted in steps of a grid. Each update is clipped, rotated and rounded to it at random, until it keeps a
    bound on its norm there, which is the sensitivity. Whoever looks knows the sum, and the noise of the `colluding`
    sites that help them; what is left is that of `shares` sites or more.

    Attributes:
        unit: Always `client`.
        trust: Always `cohort`.
        mechanism: Distribution of a share of noise.
        clipping_norm: L2 bound on one client's update.
        granularity: Step of the grid, in the update's own units.
        l2_squared: Most that the squares of a rounded update's values add up to, in squared steps.
        l1: Most that their sizes add up to, in steps.
        variance: Of the noise of `shares` sites together, on each coordinate, in squared steps.
        shares: Fewest honest sites in a sum: those whose noise counts.
        colluding: Most sites of a sum that may help whoever looks.
        dimensions: Coordinates that are rounded and noised.
        steps: Number of sums.
        distance: Total variation distance of those shares' noise from the exact distribution; goes into delta.
        run: Digest of the run's configuration.
        server_round: The round, from 1.
    """

    KIND: ClassVar[str] = "distributed-noise"
    unit: Unit
    trust: Trust
    mechanism: SharedNoise
    clipping_norm: float
    granularity: float
    l2_squared: int
    l1: int
    variance: int
    shares: int
    colluding: int
    dimensions: int
    steps: int
    distance: float
    run: str
    server_round: int

    @property
    def noise_multiplier(self) -> float:
        """Noise of the fewest honest sites over the sensitivity of the rounded sum."""
        return math.sqrt(self.variance / self.l2_squared)

    def check(self) -> None:
        """Raise LedgerError if it cannot be counted."""
        _require(
            self.unit == "client"
            and self.trust == "cohort"
            and self.mechanism in _SHARED
            and _positive(self.clipping_norm, self.granularity)
            and _count(self.l2_squared, self.l1, self.variance, self.shares, self.dimensions, self.steps)
            and max(self.l2_squared, self.l1, self.variance, self.dimensions) <= _MOST
            and self._covers()
            and type(self.colluding) is int
            and self.colluding >= 0
            and _error(self.distance)
            and _place(self.run, self.server_round)
        )

    def _covers(self) -> bool:
        """Whether the sensitivities are no less than what the clipping norm gives, rounded down to whole numbers."""
        norm = self.clipping_norm / self.granularity
        return (self.l2_squared + 1) * (1 + 1e-9) >= norm * norm and (self.l1 + 1) ** 2 > self.l2_squared


@dataclass(frozen=True, kw_only=True, slots=True)
class NonPrivate:
    """A release without noise: from here on the spent epsilon is infinite."""

    KIND: ClassVar[str] = "non-private"
    run: str
    server_round: int

    def check(self) -> None:
        """Raise LedgerError if a field has another type than it must have."""
        _require(_place(self.run, self.server_round))


PrivacyEvent = SampledGaussian | MatrixGaussian | DistributedNoise | NonPrivate
_KINDS: dict[str, type[PrivacyEvent]] = {
    kind.KIND: kind for kind in (SampledGaussian, MatrixGaussian, DistributedNoise, NonPrivate)
}


def event_to_dict(event: PrivacyEvent) -> dict[str, Any]:
    """The event as JSON values, with its kind and version."""
    return {"version": VERSION, "kind": event.KIND, **asdict(event)}


def event_from_dict(record: dict[str, Any]) -> PrivacyEvent:
    """The event that `event_to_dict` wrote.

    Raises:
        LedgerError: Unknown version, kind or field, or a value out of range. An event that is not understood cannot be
            counted, so it is never skipped.
    """
    fields = dict(record)
    version, kind = fields.pop("version", None), fields.pop("kind", None)
    if version != VERSION or type(kind) is not str or kind not in _KINDS:
        raise LedgerError(
            f"unknown privacy event {kind!r} of version {version!r}",
            hint="this ledger was written by another version of Coterie",
        )
    try:
        event = _KINDS[kind](**fields)
    except TypeError as e:
        raise LedgerError(f"a {kind} event has wrong fields", hint="the ledger was edited or damaged") from e
    event.check()
    return event


def _require(sound: bool) -> None:
    if not sound:
        raise LedgerError("a privacy event has impossible values", hint="the ledger was edited or damaged")


def _positive(*values: object) -> bool:
    return all(type(value) in {int, float} and 0 < value < math.inf for value in values)  # type: ignore[operator]


def _count(*values: object) -> bool:
    return all(type(value) is int and value >= 1 for value in values)


def _error(value: object) -> bool:
    return type(value) in {int, float} and 0 <= value < 1  # type: ignore[operator]


def _place(run: object, server_round: object) -> bool:
    return type(run) is str and _count(server_round)
