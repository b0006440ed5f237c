"""Updates that began with different models, on the way to one step: their mean, weighed by staleness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

_BLOCK: Final = 1 << 16
"""Values that are weighed at a time: their float64 products stay in a core's own cache."""


def staleness_factor(staleness: int, *, exponent: float) -> float:
    """How much an update counts that began `staleness` steps ago, beside one that began with the present model.

    Source: Nguyen et al. 2022 (arXiv 2106.06639), section 5: s(t) = 1 / sqrt(1 + t), which is the exponent 0.5; the
    general form is Xie et al. 2019 (arXiv 1903.03934), section 5.2, polynomial.
    """
    return float((1.0 + staleness) ** -exponent)


class UpdateBuffer:
    """Forms the mean update while replies arrive: one model of float64 in memory, however many there are.

    The mean is (sum of w s (reply - base)) / (sum of w), with each reply's weight w and staleness factor s. The factors
    are not in the divisor: stale updates make the step smaller, as in the paper.

    Attributes:
        count: How many updates are in it.
        weight: Sum of their weights, without staleness.
    """

    def __init__(self, template: Arrays) -> None:
        """Empty.

        Args:
            template: Any model of the run: its names, shapes and order.
        """
        self.count, self.weight = 0, 0.0
        self._sums = {name: np.zeros(values.shape) for name, values in template.items()}
        self._metrics: dict[str, float] = {}

    def add(self, reply: Arrays, base: Arrays, *, weight: float, factor: float, metrics: Mapping[str, float]) -> None:
        """Add one update; nothing of it is kept. Metrics are weighed without the factor.

        Args:
            reply: The client's model after training; finite, of the template's names and shapes.
            base: The model that it began with.
            weight: Positive.
            factor: Of its staleness.
            metrics: By name; the same names every time.
        """
        for name, total in self._sums.items():
            new, old, flat = reply[name].reshape(-1), base[name].reshape(-1), total.reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                part = slice(start, start + _BLOCK)
                change = np.subtract(new[part], old[part], dtype=np.float64)
                change *= weight * factor
                flat[part] += change
        self.count += 1
        self.weight += weight
        for name, value in metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + weight * value

    def metrics(self) -> dict[str, float]:
        """Weighted means."""
        return {name: total / self.weight for name, total in self._metrics.items()}

    def moved(self, model: Arrays) -> dict[str, NDArray[Any]]:
        """The model plus the mean update, in the model's dtypes; integers are rounded to the nearest.

        Edge cases: a value beyond the dtype becomes infinite, for the caller to refuse. Empties the buffer's sums.
        """
        arrays = {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, values in model.items():
                total = self._sums.pop(name)  # each sum is let go of before the next is cast
                moved = np.asarray(total / self.weight + values)
                arrays[name] = np.asarray(np.rint(moved) if values.dtype.kind in "iub" else moved, dtype=values.dtype)
        return arrays
