"""Plain types that models and data agree on, so that neither has to know the other."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Examples as tensors of equal length.

    Attributes:
        inputs: float32[n, *input_shape] or, for tokens, int64[n, length].
        targets: int64[n], or int64[n, length] where the schema is `per_position`.
        entities: int64[n], not negative: whom each example belongs to, a patient or a user. Equal numbers are the same
            entity in all parts of a `Federation`; they need not be consecutive, mean nothing outside and are never
            sent. None: every example stands alone.
    """

    inputs: Tensor
    targets: Tensor
    entities: Tensor | None = None

    def __len__(self) -> int:
        """Number of examples n."""
        return len(self.targets)

    def to(self, device: torch.device) -> Self:
        """The examples on `device`; the same object where they are there already."""
        if self.targets.device == device:
            return self
        entities = None if self.entities is None else self.entities.to(device)
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device), entities=entities)

    def take(self, indices: Tensor) -> Self:
        """The examples at `indices` (int64[k])."""
        entities = None if self.entities is None else self.entities[indices]
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices], entities=entities)

    def part(self, begin: int, end: int) -> Self:
        """The examples from `begin` up to `end`, without copying them."""
        entities = None if self.entities is None else self.entities[begin:end]
        return replace(self, inputs=self.inputs[begin:end], targets=self.targets[begin:end], entities=entities)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All examples of one or more parts, one after the other.

        Equal numbers stay one entity. Where only some parts have entities, each example of the others becomes an entity
        of its own.
        """
        filled = [part for part in parts if len(part)] or list(parts[:1])
        numbers = [part.entities for part in filled]
        known = [number for number in numbers if number is not None]
        entities = None
        if known:
            used = max((int(number.max()) + 1 for number in known if len(number)), default=0)
            for i, part in enumerate(filled):
                if numbers[i] is None:
                    numbers[i] = torch.arange(used, used + len(part), device=part.targets.device)
                    used += len(part)
            entities = torch.cat([number for number in numbers if number is not None])
        return cls(
            inputs=torch.cat([part.inputs for part in filled]),
            targets=torch.cat([part.targets for part in filled]),
            entities=entities,
        )


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
