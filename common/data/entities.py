"""Entities: the patients or users to whom examples belong, where one can have several.

Differential privacy that protects an entity counts on three things, which this module and its callers see to: every row
has its entity, all of an entity's examples are trained on by one client, and none of them is held out meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from common.data.collection import Integers
from common.errors import DataError
from common.schema import Examples, Federation

NOBODY = frozenset({"", "?", "-", "na", "n/a", "<na>", "nan", "nat", "none", "null", "unknown"})
"""Names, in lower case, that say that nobody knows whose a row is."""

_NUMBER = re.compile(r"(-?\d+)\.0*")


def known_name(name: str | None) -> str | None:
    """The name of an entity, or None where it says that the entity is not known: `NOBODY`, or a negative number.

    Spaces around it and a fraction of zeros are taken away: a table that was put together from two can write one entity
    as 7 and as 7.0.

    Rows of unknown entities are to be dropped. They must not be taken for entities of their own, nor for one that is
    called "NA": each could belong to anybody, who would then be protected with a part of their rows only. To drop a row
    that has an entity after all costs that row and no privacy.
    """
    plain = "" if name is None else name.strip()
    if whole := _NUMBER.fullmatch(plain):
        plain = whole[1]
    unknown = plain.lower() in NOBODY or (plain.startswith("-") and plain[1:].isdecimal())
    return None if unknown else plain


def number(names: Sequence[str | None]) -> Integers:
    """int64[n]: the place of each example's entity among the distinct names.

    Args:
        names: n names, all of them known (`known_name`).
    """
    plain = [known_name(name) or "" for name in names]
    return np.unique(np.asarray(plain, dtype=str), return_inverse=True)[1].astype(np.int64)


def units_of(numbers: Integers) -> tuple[Integers, Integers]:
    """What belongs together: int64[n], the unit (from 0) of each example, and int64[u], each unit's first example.

    Args:
        numbers: int64[n]; examples of equal number are one unit.
    """
    _, first, units = np.unique(numbers, return_index=True, return_inverse=True)
    return units.astype(np.int64), first.astype(np.int64)


def main_classes(units: Integers, labels: Integers) -> Integers:
    """int64[u]: the class that most of each unit's examples have, the lower one of two that are equally frequent.

    Args:
        units: int64[n], the unit (from 0, none left out) of each example.
        labels: int64[n], the class of each example, not negative.
    """
    if not len(labels):
        return np.empty(0, np.int64)
    classes = int(labels.max()) + 1
    pairs, counts = np.unique(units * classes + labels, return_counts=True)
    unit, label = np.divmod(pairs, classes)
    order = np.lexsort((label, -counts, unit))
    _, first = np.unique(unit[order], return_index=True)
    found: Integers = label[order][first]
    return found


def members(parts: Sequence[Integers], units: Integers) -> list[Integers]:
    """The examples, ascending, of each part of the units.

    Args:
        parts: Units by part; every unit is in exactly one.
        units: int64[n], the unit of each example.
    """
    part_of = np.empty(sum(map(len, parts)), np.int64)
    for i, part in enumerate(parts):
        part_of[part] = i
    owner = part_of[units]
    ends = np.cumsum(np.bincount(owner, minlength=len(parts)))[:-1]
    return np.split(np.argsort(owner, kind="stable"), ends)


def check_entities(federation: Federation, *, where: str) -> None:
    """Refuse a federation that divides an entity; it looks at every client.

    **Guarantee**: after it, no entity is trained on by two clients, and none is both trained on and held out.

    Raises:
        DataError: How many entities are divided, and how; no name or number of one is told.
    """
    trained, held = [], [federation.test]
    for client in federation.clients:
        trained.append(_numbers([client.train]))
        held.append(client.test)
    check_division(trained, _numbers(held), where=where)


def check_division(trained: Sequence[Integers], held: Integers, *, where: str) -> None:
    """The same of a division that no tensors were made of yet.

    Args:
        trained: The entities of each client's training examples, int64[n] each; an entity as often as it has examples.
        held: int64[n], the entities of all held-out examples.
        where: Begins the message.

    Raises:
        DataError: See `check_entities`.
    """
    distinct = [np.empty(0, np.int64), *map(np.unique, trained)]
    known, times = np.unique(np.concatenate(distinct), return_counts=True)
    if several := int((times > 1).sum()):
        raise DataError(
            f"{where}: {several} entities are trained on by more than one client",
            hint="what their privacy costs would add up over clients: give each entity to one client, and different "
            "people different numbers",
        )
    if both := int(np.isin(known, held).sum()):
        raise DataError(
            f"{where}: {both} entities are both trained on and held out",
            hint="hold out all examples of an entity or none, and give different people different numbers",
        )


def _numbers(parts: Sequence[Examples]) -> Integers:
    """int64[k]: the entities of the parts' examples; none of parts without entities."""
    numbers = [part.entities.numpy() for part in parts if part.entities is not None]
    return np.concatenate([np.empty(0, np.int64), *numbers])
