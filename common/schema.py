"""Plain types that models and data agree on, so that neither has to know the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

Kind = Literal["image", "tabular", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSchema:
    """Public facts about a data set: all that is needed to build a model for it.

    Nothing here may be computed from private examples; `num_classes` and `vocabulary_size` are declared, not counted.

    Attributes:
        kind: `image` (float32[channels, height, width]), `tabular` (float32[features]), `tokens` (int64[length]).
        input_shape: Shape of one example's input.
        num_classes: Number of classes; for next-token data the size of the vocabulary.
        vocabulary_size: Number of token ids (`tokens` only, else 0).
        per_position: True where every position has a target (next-token prediction): targets int64[n, length].
        class_names: One name a class, or empty.
        feature_names: One name a column (`tabular` only), or empty.
    """

    kind: Kind
    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0
    per_position: bool = False
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Examples as two tensors of equal length.

    Attributes:
        inputs: float32[n, *input_shape] or, for tokens, int64[n, length].
        targets: int64[n], or int64[n, length] where the schema is `per_position`.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Number of examples n."""
        return len(self.targets)

    def to(self, device: torch.device) -> Self:
        """The examples on `device`; the same object where they are there already."""
        if self.targets.device == device:
            return self
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def take(self, indices: Tensor) -> Self:
        """The examples at `indices` (int64[k])."""
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices])


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientData:
    """What one client holds: a stable, public name, and its private examples."""

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Federation:
    """A data set divided among clients, as a simulation sees it. `test` is held out from everybody's training."""

    schema: DataSchema
    clients: tuple[ClientData, ...]
    test: Examples
