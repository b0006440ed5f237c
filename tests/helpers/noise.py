"""Noise sources that hide nothing: for tests that look at what the noise would cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Silence:
    """No noise, and a Poisson sample of everything."""

    def integers(self, count: int) -> NDArray[np.int32]:
        return np.zeros(count, np.int32)

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.zeros(count, np.uint64)


class Loud(Silence):
    """Noise of a constant size on every coordinate; counts how often noise is drawn."""

    def __init__(self, integer: int = 1) -> None:
        self._integer = integer
        self.drawn: list[int] = []

    def integers(self, count: int) -> NDArray[np.int32]:
        self.drawn.append(count)
        return np.full(count, self._integer, np.int32)
