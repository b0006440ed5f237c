"""From events to spent budget, and from a budget back to the noise that keeps it. Accountants only interpret events.

One of them is the gate: `spent`, Renyi accounting at the order that the budget fixed. Noise is calibrated with the gate
itself: noise calibrated by a tighter accountant would be stopped before its last round. The others, `ACCOUNTANTS`,
stand in reports beside it. They say what the same releases would have cost had all parameters been fixed beforehand,
which is not so where a later run is chosen after an earlier one is seen. How events are read is `tally`'s to say.
Nobody has computed privacy loss distributions of distributed noise in many dimensions: such sums count by Renyi
accounting at the best order in every accountant.

Noise is drawn from a distribution at total variation distance `distance` from the one that is counted. With t the sum
over all events, what is (epsilon, d) private by the count is (epsilon, d + t (1 + e^epsilon)) private in truth, so d is
chosen below delta to make room for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from common.errors import PrivacyError
from common.privacy.accounting.budget import Budget
from common.privacy.accounting.losses import Curve, privacy_loss_curve
from common.privacy.accounting.renyi import ORDERS, epsilon_at, incomputable, renyi_divergence
from common.privacy.accounting.shares import divergence_of_sum
from common.privacy.accounting.tally import Relation, Tally
from common.privacy.events import MatrixGaussian, NonPrivate, PrivacyEvent, SampledGaussian, Unit

__all__ = [
    "ACCOUNTANTS",
    "ORDERS",
    "Accountant",
    "Budget",
    "PrivacyLoss",
    "Relation",
    "Renyi",
    "ReplaceOne",
    "against_coordinator",
    "best_order",
    "calibrate_noise",
    "spent",
    "spent_of",
]

_MAX_NOISE_MULTIPLIER = 1e6
_CALIBRATION_STEPS = 100
_BEST_ORDER_ROUNDS = 20
_MOST_EXPONENT = 700


def spent(events: Iterable[PrivacyEvent], *, budget: Budget, unit: Unit = "example") -> float:
    """The gate: epsilon at `budget.delta` of all events together, by Renyi accounting at `budget.order`, add/remove.

    Guarantee:
        Never below the true epsilon of the composition, also where each run was chosen in the light of what earlier
        ones released, as long as it is compared with a ceiling before each release. More events, less noise or a
        smaller delta never lower it. It does not depend on the order of events, nor on how steps are divided among
        them.

    Edge cases:
        No events give 0. A non-private event, or a delta that the noise's own error uses up, gives infinity. Trust in
        the coordinator is counted as if it were justified: whether a site grants it is for its policy to say.

    Raises:
        PrivacyError: The result cannot be computed, or an event is unknown or has impossible values.

    Source:
        Adaptively chosen runs: Feldman, Zrnic 2021 (Renyi filter at an order fixed in advance). The rest: `renyi`.
    """
    return spent_of(Tally(events, unit=unit), budget)


def spent_of(tally: Tally, budget: Budget) -> float:
    """`spent`, where the events were read before."""
    return _epsilon(tally, budget.delta, _renyi_curve(budget.order))


def against_coordinator(events: Iterable[PrivacyEvent]) -> list[PrivacyEvent]:
    """The same events as the coordinator learns them: where it adds the noise itself, it has seen what is below."""
    return [
        NonPrivate(run=event.run, server_round=event.server_round)
        if isinstance(event, SampledGaussian | MatrixGaussian) and event.trust == "coordinator"
        else event
        for event in events
    ]


class Accountant(Protocol):
    """One way to say what events cost.

    Attributes:
        name: Short, for tables.
        relation: Which data sets are neighbours.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - above
    @property
    def relation(self) -> Relation: ...  # noqa: D102 - above

    def epsilon(self, events: Iterable[PrivacyEvent], *, delta: float, unit: Unit = "example") -> float:
        """Epsilon of all events together, as if their parameters had been fixed beforehand.

        Raises:
            PrivacyError: As `spent`.
        """


@dataclass(frozen=True, slots=True)
class Renyi:
    """The least over all `ORDERS`: what the gate would say had it known the best order beforehand."""

    name: str = "Renyi, best order"
    relation: Relation = "add/remove"

    def epsilon(self, events: Iterable[PrivacyEvent], *, delta: float, unit: Unit = "example") -> float:
        """See `Accountant`."""
        return _count(events, unit=unit, relation=self.relation, delta=delta, curve=_renyi_curve(*ORDERS))


@dataclass(frozen=True, slots=True)
class PrivacyLoss:
    """Privacy loss distributions: the tightest that is known, rounded up to its grid.

    The noise is taken as continuous; it is discrete on a grid some 1e5 times finer than its deviation.
    """

    name: str = "privacy loss"
    relation: Relation = "add/remove"

    def epsilon(self, events: Iterable[PrivacyEvent], *, delta: float, unit: Unit = "example") -> float:
        """See `Accountant`."""
        curve = partial(_loss_curve, replace_one=self.relation == "replace-one")
        return _count(events, unit=unit, relation=self.relation, delta=delta, curve=curve)


@dataclass(frozen=True, slots=True)
class ReplaceOne:
    """Privacy loss distributions where neighbours differ by one unit replaced by another: up to twice the distance."""

    name: str = "replace one"
    relation: Relation = "replace-one"

    def epsilon(self, events: Iterable[PrivacyEvent], *, delta: float, unit: Unit = "example") -> float:
        """See `Accountant`."""
        curve = partial(_loss_curve, replace_one=self.relation == "replace-one")
        return _count(events, unit=unit, relation=self.relation, delta=delta, curve=curve)


ACCOUNTANTS: tuple[Accountant, ...] = (Renyi(), PrivacyLoss(), ReplaceOne())
"""All that stand in reports. One contract suite runs on each."""


Release = Callable[[float], Sequence[PrivacyEvent]]
"""From a noise multiplier to all events of a run. More noise must not cost more."""


def calibrate_noise(budget: Budget, release: Release, *, unit: Unit = "example") -> float:
    """The smallest noise multiplier (to 1e-4 relative) with which a run stays within a budget.

    Guarantee: `spent(release(result), budget=budget) <= budget.epsilon`.

    Raises:
        PrivacyError: No noise multiplier up to 1e6 is enough.
    """

    def fits(noise_multiplier: float) -> bool:
        return spent(release(noise_multiplier), budget=budget, unit=unit) <= budget.epsilon

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > _MAX_NOISE_MULTIPLIER:
            raise PrivacyError(
                f"no noise keeps epsilon {budget.epsilon:g} at delta {budget.delta:g}",
                hint="raise epsilon or delta, or lower the number of rounds",
            )
    for _ in range(_CALIBRATION_STEPS):
        if high - low <= 1e-4 * high:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def best_order(epsilon: float, delta: float, release: Release, *, unit: Unit = "example") -> int:
    """The order with which `calibrate_noise` needs the least noise for one run.

    Calibrate at some order; take the order that is cheapest for that noise; repeat until it stays. There no other order
    reaches the target with less noise, since less noise never costs less.

    Raises:
        PrivacyError: No order reaches the target.
    """
    order = Budget.opened(epsilon, delta).order
    for _ in range(_BEST_ORDER_ROUNDS):
        budget = Budget(epsilon=epsilon, delta=delta, order=order)
        tally = Tally(release(calibrate_noise(budget, release, unit=unit)), unit=unit)
        costs = {a: _epsilon(tally, delta, _renyi_curve(a)) for a in ORDERS}
        cheapest = min(ORDERS, key=costs.__getitem__)
        if costs[cheapest] >= costs[order]:
            break
        order = cheapest
    return order


def _count(
    events: Iterable[PrivacyEvent],
    *,
    unit: Unit,
    relation: Relation,
    delta: float,
    curve: Callable[[Tally], Curve],
) -> float:
    """Epsilon at `delta` of events, read for a unit and a relation."""
    return _epsilon(Tally(events, unit=unit, relation=relation), delta, curve)


def _epsilon(tally: Tally, delta: float, curve: Callable[[Tally], Curve]) -> float:
    """Epsilon at `delta`, the noise's own error included."""
    if not 0 < delta < 1:
        raise PrivacyError(f"epsilon at delta {delta} cannot be counted", hint="delta lies between 0 and 1")
    if tally.infinite:
        return math.inf
    if tally.empty:
        return 0.0
    try:
        epsilon = _with_distance(curve(tally), delta, tally.distance)
    except (ArithmeticError, ValueError, MemoryError) as e:
        raise incomputable() from e
    if math.isnan(epsilon):
        raise incomputable()
    return epsilon


def _with_distance(curve: Curve, delta: float, distance: float) -> float:
    """The least epsilon, up to rounding, with curve(delta - distance (1 + e^epsilon)) <= epsilon.

    The room that is taken out of delta depends on epsilon itself. Whole numbers x are tried in turn until epsilon with
    room for e^x is at most x: then the room is enough. The least such x never falls where the curve rises, so neither
    does the result, to the last bit. Where it fits at all it costs next to nothing: distances are far below delta.
    """
    if distance == 0:
        return curve(delta)
    x = 0
    while True:
        room = distance * (1 + math.exp(x)) if x < _MOST_EXPONENT else math.inf
        epsilon = curve(delta - room * (1 + 1e-9))
        if epsilon <= x or epsilon == math.inf:
            return epsilon
        x = math.ceil(epsilon)


def _renyi_curve(*orders: int) -> Callable[[Tally], Curve]:
    """Epsilon by Renyi accounting as a function of delta, the least over `orders`."""

    def curve(tally: Tally) -> Curve:
        divergences = [(order, _divergence(tally, order)) for order in orders]
        return lambda delta: min(epsilon_at(order, divergence, delta) for order, divergence in divergences)

    return curve


def _divergence(tally: Tally, order: int) -> float:
    """Of everything together: divergences of one order add up."""
    steps = (count * renyi_divergence(noise, rate, order) for noise, rate, count in tally.segments)
    return math.fsum((*steps, *_of_sums(tally, order)))


def _of_sums(tally: Tally, order: int) -> list[float]:
    return [count * divergence_of_sum(noised, order) for noised, count in tally.sums]


def _loss_curve(tally: Tally, *, replace_one: bool) -> Curve:
    """Privacy loss of what is Gaussian, and beside it sums with distributed noise at the best order, each with half of
    delta (basic composition).
    """
    if not tally.sums:
        return privacy_loss_curve(tally.segments, replace_one=replace_one)
    divergences = [(order, math.fsum(_of_sums(tally, order))) for order in ORDERS]

    def of_sums(delta: float) -> float:
        return min(epsilon_at(order, divergence, delta) for order, divergence in divergences)

    if not tally.segments:
        return of_sums
    of_gaussians = privacy_loss_curve(tally.segments, replace_one=replace_one)
    return lambda delta: of_gaussians(delta / 2) + of_sums(delta / 2)
