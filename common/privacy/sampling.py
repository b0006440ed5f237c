"""Which examples a step takes: each unit by itself with the plan's probability."""

from __future__ import annotations

import torch
from torch import Tensor

from common.privacy.noise import NoiseSource, choose
from common.privacy.plan import PrivacyPlan


class UnitSampler:
    """Samples examples, or entities (patients, users) of which each then gives one of its examples.

    Guarantee: A unit enters a step with probability `plan.sampling_rate`, independently of all others, and then with
    exactly one example. So one unit moves the step's sum by at most the clipping norm, however many examples it has.
    """

    def __init__(self, entities: Tensor | None, count: int) -> None:
        """Prepare.

        Args:
            entities: int64[count], whom each example belongs to; None where every example stands alone.
            count: Number of examples.
        """
        self._count = count
        self._order: Tensor | None = None
        if entities is not None:
            _, self._of = torch.unique(entities.cpu(), return_inverse=True)
            self._order = torch.argsort(self._of, stable=True)
            self._sizes = torch.bincount(self._of) if count else torch.zeros(0, dtype=torch.int64)
            self._starts = torch.cumsum(self._sizes, 0) - self._sizes
            self._count = len(self._sizes)

    def sample(self, plan: PrivacyPlan, source: NoiseSource) -> Tensor:
        """int64[k]: indices of the examples of one step."""
        units = plan.sample(self._count, source)
        if self._order is None:
            return units
        own = torch.as_tensor(choose(self._sizes[units].numpy(), source), dtype=torch.int64)
        return self._order[self._starts[units] + own]
