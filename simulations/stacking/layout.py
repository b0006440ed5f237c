"""Where a model's parameters lie in one row of numbers, so that a stack of clients is a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import FailureCode, PeerError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One trainable parameter.

    Attributes:
        name: In the model's state dict.
        shape: Its own.
        first: Column of its first value.
        last: Column after its last value.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    last: int


class Layout:
    """The trainable parameters of a model in the order of `model.parameters()`, one after the other."""

    def __init__(self, model: nn.Module) -> None:
        places, first = [], 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                last = first + parameter.numel()
                places.append(Place(name=name, shape=tuple(parameter.shape), first=first, last=last))
                first = last
        self.places = tuple(places)
        self.size = first
        self._state = {name: tuple(values.shape) for name, values in model.state_dict().items()}
        self._trained = {place.name: place for place in places}

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """By name: [members, *shape] of `rows` [members, size], without a copy; of [size] the shapes alone."""
        leading = rows.shape[:-1]
        return {place.name: rows[..., place.first : place.last].view(*leading, *place.shape) for place in self.places}

    def check(self, start: Mapping[str, NDArray[Any]]) -> None:
        """Refuse weights of another model.

        Raises:
            PeerError: A name or a shape is not the model's, or a value is no number.
        """
        kinds = {name: values.shape for name, values in start.items() if values.dtype.kind in "fiu"}
        if kinds != self._state:
            raise PeerError(FailureCode.INVALID_REQUEST)

    def read(self, start: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """float32[size]: the trainable weights in one row."""
        row = np.empty(self.size, dtype=np.float32)
        for place in self.places:
            row[place.first : place.last] = start[place.name].reshape(-1)
        return row

    def load_fixed(self, model: nn.Module, start: Mapping[str, NDArray[Any]]) -> None:
        """Let the model have what came for all that is not trained."""
        for name, values in model.state_dict().items():
            if name not in self._trained:
                values.copy_(torch.from_numpy(np.array(start[name])))

    def write(
        self, total: NDArray[np.float64], start: Mapping[str, NDArray[Any]], weight: float
    ) -> dict[str, NDArray[np.float64]]:
        """The sums by name, in the order of the state dict; what is not trained is `weight` times its start.

        Args:
            total: float64[size], of which parts are handed out.
            start: The weights before training.
            weight: Of all members together.
        """
        sums = {}
        for name, shape in self._state.items():
            place = self._trained.get(name)
            if place is None:
                sums[name] = np.asarray(start[name], dtype=np.float64) * weight
            else:
                sums[name] = total[place.first : place.last].reshape(shape)
        return sums

    def limits(self, start: Mapping[str, NDArray[Any]], largest: float) -> list[float]:
        """For each parameter the largest magnitude that counts as sound."""
        limits = []
        for place in self.places:
            values = start[place.name]
            most = max(float(values.max()), -float(values.min())) if values.size else 0.0
            limits.append(max(largest, 2 * most) if not math.isnan(most) else math.nan)
        return limits
