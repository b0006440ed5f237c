"""What clients learnt before they masked it, in every form in which it could travel or be stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import client.mods.secagg as mod
from common.flower import arrays_of
from common.secagg.packing import pack

_ENOUGH = 64
"""Values; a leak would not stop before them."""


class Learnt:
    """Keeps each update as the mod sees it: trained weights, difference, and the numbers that are masked."""

    def __init__(self) -> None:
        self.trained: list[NDArray[Any]] = []
        self.updates: list[NDArray[Any]] = []
        self.vectors: list[NDArray[Any]] = []

    @property
    def forms(self) -> list[NDArray[Any]]:
        """The beginning of all of it, as it would be written in clear."""
        floats = [values.astype(np.float32) for values in self.updates]
        return [values.ravel()[:_ENOUGH] for values in [*self.trained, *self.updates, *floats, *self.vectors]]


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Learnt]:
    """While the block lasts, what clients in this process mask is kept."""
    learnt, encoded = Learnt(), mod._encoded

    def keep(codec: Any, request: Any, start: Any, reply: Any, *, seed: bytes) -> Any:
        vector = encoded(codec, request, start, reply, seed=seed)
        trained = arrays_of(reply.content)
        learnt.trained += [np.array(values) for values in trained.values()]
        learnt.updates.append(np.concatenate([(trained[k].astype(float) - start[k]).ravel() for k in trained]))
        learnt.vectors += [vector.copy(), pack(vector.copy(), codec.bits)]
        return vector

    with monkeypatch.context() as patch:
        patch.setattr(mod, "_encoded", keep)
        yield learnt
