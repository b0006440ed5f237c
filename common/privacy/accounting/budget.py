"""A ceiling over everything that may be learnt of one data set, and the order in which it is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from common.errors import PrivacyError
from common.privacy.accounting.renyi import ORDERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What all events of a ledger together may cost, under add/remove of one unit.

    Attributes:
        epsilon: The ceiling.
        delta: At which epsilon is counted.
        order: Order of Renyi accounting. It is fixed when the budget opens, from epsilon and delta alone: later runs
            are chosen in the light of earlier results, and adding up divergences until a ceiling is reached is proved
            for an order that does not depend on them (Feldman, Zrnic 2021, theorem 4.3).

    Raises:
        PrivacyError: A value is out of range.
    """

    epsilon: float
    delta: float
    order: int

    def __post_init__(self) -> None:
        """See the class."""
        if not (_is_number(self.epsilon) and 0 < self.epsilon < math.inf):
            raise PrivacyError(f"a budget's epsilon is {self.epsilon}", hint="set a finite number above 0")
        if not (_is_number(self.delta) and 0 < self.delta < 1):
            raise PrivacyError(
                f"a budget's delta is {self.delta}", hint="set a number above 0 and well below one over the data's size"
            )
        if type(self.order) is not int or self.order not in ORDERS:
            raise PrivacyError(
                f"a budget's order is {self.order}", hint=f"choose one of {ORDERS[0]} to 64, or {ORDERS[63:]}"
            )

    @classmethod
    def opened(cls, epsilon: float, delta: float, order: int | None = None) -> Self:
        """A new budget; without `order`, that with which a divergence that is linear in the order may be largest.

        Such are Gaussians without sampling. Of D(a) = a r, the largest r that fits is
        (epsilon - log(1 - 1/a) + log(a delta) / (a - 1)) / a (`renyi.epsilon_at`, solved for r). A run that samples
        rarely does best with a lower order: `accountant.best_order` finds it.

        Raises:
            PrivacyError: A value is out of range, or epsilon is so small that no order leaves room for anything.
        """
        if order is not None:
            return cls(epsilon=epsilon, delta=delta, order=order)
        budget = cls(epsilon=epsilon, delta=delta, order=ORDERS[-1])  # checks the values
        room = {a: (epsilon - math.log1p(-1 / a) + (math.log(a) + math.log(delta)) / (a - 1)) / a for a in ORDERS}
        best = max(ORDERS, key=room.__getitem__)
        if room[best] <= 0:
            raise PrivacyError(
                f"no noise keeps a budget of epsilon {epsilon} at delta {delta}", hint="raise epsilon or delta"
            )
        return cls(epsilon=budget.epsilon, delta=budget.delta, order=best)


def _is_number(value: object) -> bool:
    return type(value) in {int, float}
