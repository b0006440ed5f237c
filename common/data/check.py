"""What is in a data set, in counts: for its owner's eyes, on its owner's machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.config.settings import DataSettings
from common.data.entities import units_of
from common.data.loading import load_source
from common.schema import DataSchema, Examples, Federation
from common.site import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Counts that describe a data set. They are private: classes are counted.

    Attributes:
        name: Registered name.
        schema: Public facts, as a run would see them.
        rows: Rows in the source.
        kept: Examples that a run would use.
        classes: Examples by class; empty for running text, which has no class an example.
        groups: Examples by group of the data's own (natural partition), or empty.
        entities: Number of entities; 0 where every example stands alone.
        largest_entity: Most examples that belong to one entity; 0 where there are none.
        missing: Missing values by column.
        dropped: Rows left out, by reason.
        repaired: Values mended, by reason.
    """

    name: str
    schema: DataSchema
    rows: int
    kept: int
    classes: Mapping[str, int]
    groups: Mapping[str, int]
    entities: int
    largest_entity: int
    missing: Mapping[str, int]
    dropped: Mapping[str, int]
    repaired: Mapping[str, int]


def check_data(name: str, *, site: Site) -> DataReport:
    """Read a data set as training would and count what is there. Nothing is written, and no record is shown.

    Raises:
        DataError: It cannot be read, or does not fit its description.
    """
    # Built without validation: the name came from the command line and is looked up, not trusted.
    settings = DataSettings.model_construct(name=name)
    loaded = load_source(settings, seed=0, site=site)
    if isinstance(loaded, Federation):
        everything = Examples.joined([*(client.train for client in loaded.clients), loaded.test])
        entities, largest = _entities(everything)
        sizes = {client.name: len(client.train) for client in loaded.clients}
        return DataReport(
            name=name,
            schema=loaded.schema,
            rows=len(everything),
            kept=len(everything),
            classes=_classes(loaded.schema, everything.targets),
            groups=sizes,
            entities=entities,
            largest_entity=largest,
            missing={},
            dropped={},
            repaired={},
        )
    entities, largest = _entities(loaded.examples)
    counts = [] if loaded.group_of is None else torch.bincount(torch.from_numpy(loaded.group_of)).tolist()
    return DataReport(
        name=name,
        schema=loaded.schema,
        rows=loaded.rows,
        kept=len(loaded.examples),
        classes=_classes(loaded.schema, loaded.examples.targets),
        groups=dict(zip(loaded.groups, counts, strict=True)),
        entities=entities,
        largest_entity=largest,
        missing=loaded.missing,
        dropped=loaded.dropped,
        repaired=loaded.repaired,
    )


def _entities(examples: Examples) -> tuple[int, int]:
    """How many entities there are, and how many examples the largest has."""
    if examples.entities is None:
        return 0, 0
    units, first = units_of(examples.entities.numpy())
    return len(first), int(np.bincount(units).max(initial=0))


def _classes(schema: DataSchema, targets: torch.Tensor) -> dict[str, int]:
    """Examples by class, also of classes that nobody has."""
    if schema.per_position:
        return {}
    names = schema.class_names or tuple(str(i) for i in range(schema.num_classes))
    counts = torch.bincount(targets, minlength=schema.num_classes).tolist()
    return dict(zip(names, counts, strict=True))
