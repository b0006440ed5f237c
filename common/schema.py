"""Plain types that models and data agree on, so that neither has to know the other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

Kind = Literal["image", "tabular", "tokens"]

_MOST_VALUES, _MOST_CLASSES, _MOST_NAMES, _MOST_LETTERS = 2**24, 2**20, 2**16, 200
"""Limits on what somebody else may say of their data: a model is built for it."""


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

    def to_text(self) -> str:
        """The schema as JSON; equal schemas give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def read_schema(text: str) -> DataSchema:
    """What `DataSchema.to_text` wrote, perhaps at another party.

    Raises:
        ValueError: It is no schema, or one of an absurd size.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        shape = tuple(_whole(n, 1, _MOST_VALUES) for n in fields.pop("input_shape"))
        schema = DataSchema(
            kind=fields.pop("kind"),
            input_shape=shape,
            num_classes=_whole(fields.pop("num_classes"), 1, _MOST_CLASSES),
            vocabulary_size=_whole(fields.pop("vocabulary_size"), 0, _MOST_CLASSES),
            per_position=fields.pop("per_position"),
            class_names=_names(fields.pop("class_names")),
            feature_names=_names(fields.pop("feature_names")),
        )
    except (AttributeError, KeyError, TypeError, RecursionError) as e:
        raise ValueError("it is not the description of a data set") from e
    if fields or schema.kind not in get_args(Kind) or not isinstance(schema.per_position, bool):
        raise ValueError("it is not the description of a data set")
    if not 1 <= len(shape) <= 3 or math.prod(shape) > _MOST_VALUES:
        raise ValueError("its examples have an absurd shape")
    return schema


def _whole(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("a number in it is out of range")
    return value


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > _MOST_NAMES:
        raise ValueError("its names are not a list")
    if not all(isinstance(name, str) and len(name) <= _MOST_LETTERS for name in values):
        raise ValueError("a name in it is too long")
    return tuple(values)


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
    """A data set divided among clients, as a simulation sees it.

    Attributes:
        schema: Public facts of the data.
        clients: Who holds what. A client may be made whenever somebody asks for it, so ask once and keep it; and ask
            `names`, not every client, for who there is.
        test: What is held out from everybody's training.
    """

    schema: DataSchema
    clients: Sequence[ClientData]
    test: Examples

    @property
    def names(self) -> Sequence[str]:
        """The clients' names, in their order; made one by one where clients are."""
        names: Sequence[str] | None = getattr(self.clients, "names", None)
        return tuple(client.name for client in self.clients) if names is None else names
