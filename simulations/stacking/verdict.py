"""Which members' results are sound, by the rules of `server.grids.checked`, and their weighted sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulations.stacking.layout import Layout

_QUICK_ROWS = 16
"""Members that are added up in float32 before their sum goes on in float64."""

_CERTAIN = 2.0**100
"""A bound on values in float32 that no overflow on the way can have escaped."""


class Tally:
    """Weighted sums of members' trained parameters and losses, in the order in which they are added.

    Attributes:
        total: float64[size].
        weight: Of the members that were sound.
        loss: Their weighted sum.
    """

    def __init__(self, layout: Layout, limits: Sequence[float], device: torch.device) -> None:
        self._layout, self._limits = layout, limits
        self.least_limit = min([_CERTAIN, *limits])
        self.total = torch.zeros(layout.size, dtype=torch.float64, device=device)
        self.weight = 0.0
        self.loss = 0.0

    def copy(self) -> tuple[Tensor, float, float]:
        """What `restore` goes back to."""
        return self.total.clone(), self.weight, self.loss

    def restore(self, before: tuple[Tensor, float, float]) -> None:
        """Forget what was added since: a block that failed half way."""
        self.total.copy_(before[0])
        self.weight, self.loss = before[1:]

    def add(self, rows: Tensor, losses: Tensor, weights: Tensor) -> list[bool]:
        """Add members' final parameters; says which of them were sound.

        Args:
            rows: float32[k, size].
            losses: float64[k]: mean losses.
            weights: float64[k].
        """
        sound = self._sound(rows) & losses.isfinite()
        if not bool(sound.all()):  # zero times infinity is not nothing
            rows, losses, weights = rows[sound], losses[sound], weights[sound]
        for first in range(0, len(rows), _QUICK_ROWS):
            part = slice(first, first + _QUICK_ROWS)
            self.total += weights[part].float() @ rows[part]
        self.count(losses, weights)
        return sound.tolist()

    def count(self, losses: Tensor, weights: Tensor) -> None:
        """Add weights and losses of sound members whose parameters are in the total already."""
        self.weight += float(weights.sum())
        self.loss += float((weights * losses).sum())

    def _sound(self, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1)  # bounds every value, ten times as fast as the largest is found
        sound: Tensor = norms <= self.least_limit
        if bool(sound.all()):
            return sound
        sound = torch.ones_like(sound)
        for place, limit in zip(self._layout.places, self._limits, strict=True):
            if place.last > place.first:
                sound &= rows[:, place.first : place.last].abs().amax(1) <= limit
        return sound
