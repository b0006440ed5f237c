"""Which examples are held out from everybody's training.

The choice depends on the data and the seed only, never on the partition: runs that divide the data differently, or not
at all, are measured on identical examples.
"""

from __future__ import annotations

import numpy as np

from common.config.settings import DataSettings
from common.data.collection import Collection, Integers, Mask
from common.data.entities import main_classes, units_of
from common.errors import DataError


def held_out(
    collection: Collection, settings: DataSettings, *, rng: np.random.Generator, tolerant: bool = False
) -> Mask:
    """bool[n]: the held-out examples.

    With `folds`, every example is held out in exactly one fold, and a data set's own held-out part is not used. Without
    folds it is that part, or else `test_fraction` of the examples. Examples of one entity, or of one document, stay
    together: what is counted and drawn is then entities or documents.

    **Guarantee**: folds, and held-out parts drawn here, hold out the same share of every group and of every class
    within it, to within one example (one document where examples come in documents; one entity, counted in the class
    that most of its examples have, where they have entities).

    Raises:
        DataError: There are fewer examples (or entities) than folds, or nothing would be left to train on or to hold
            out; never where `tolerant`.
    """
    if settings.folds == 0 and collection.held_out is not None:
        return collection.held_out
    units, groups, labels = _units(collection)
    count = len(groups)
    # Sorting by group, then class, then at random makes every stratum a run of positions. Whatever takes positions at
    # an even pace then takes its share of every stratum.
    order = np.lexsort((rng.permutation(count), labels, groups))
    position = np.empty(count, np.int64)
    position[order] = np.arange(count)
    counted = f"{count} {'examples' if collection.examples.entities is None else 'entities'}"
    if settings.folds:
        if count < settings.folds and not tolerant:
            raise DataError(f"{settings.name}: {counted} cannot make {settings.folds} folds", hint="lower data.folds")
        chosen = position % settings.folds == settings.fold
    else:
        fraction, phase = settings.test_fraction, rng.random()
        chosen = np.floor((position + 1) * fraction + phase) > np.floor(position * fraction + phase)
    mask: Mask = chosen[units]
    if (mask.all() or not mask.any()) and not tolerant:
        raise DataError(
            f"{settings.name}: {counted} leave nothing to train on or nothing to hold out",
            hint="change data.test_fraction, or give more data",
        )
    return mask


def _units(collection: Collection) -> tuple[Integers, Integers, Integers]:
    """The unit (entity, document or example) of each example, and the group and class of each unit."""
    n = len(collection.examples)
    groups = np.zeros(n, np.int64) if collection.group_of is None else collection.group_of
    targets = collection.examples.targets.numpy()
    labels = np.zeros(n, np.int64) if collection.schema.per_position else targets
    if collection.examples.entities is not None:
        units, first = units_of(collection.examples.entities.numpy())
        return units, groups[first], main_classes(units, labels)
    if collection.documents is None:
        return np.arange(n), groups, labels
    units, first = units_of(collection.documents)
    return units, groups[first], np.zeros(len(first), np.int64)
