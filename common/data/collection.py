"""A data set before it is divided: what every reader returns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from common.errors import DataError
from common.schema import DataSchema, Examples

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

UNLABELLED = -1
"""Target of an example whose class is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """All examples of a data set, and what is known about how they belong together.

    Attributes:
        schema: Public facts.
        examples: n examples, in the order of their source, with the entities they belong to.
        row_ids: n names by which their owner finds them again; never sent anywhere.
        groups: Slugs of the data's own groups in a stable order, or empty.
        group_of: int64[n], index into `groups`; None where there are no groups.
        held_out: bool[n], the data set's own held-out part; None where it has none.
        documents: int64[n]; examples of one document are held out together. None: every example stands alone. Entities
            go before documents where the examples have them.
        rows: Rows in the source, before any was dropped.
        missing: Missing values by column.
        dropped: Rows left out, by reason.
        repaired: Values mended, by reason.
    """

    schema: DataSchema
    examples: Examples
    row_ids: Sequence[str]
    groups: tuple[str, ...] = ()
    group_of: Integers | None = None
    held_out: Mask | None = None
    documents: Integers | None = None
    rows: int
    missing: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    repaired: Mapping[str, int] = field(default_factory=dict)


def as_examples(
    inputs: npt.NDArray[np.generic], targets: npt.NDArray[np.generic], entities: Integers | None = None
) -> Examples:
    """Arrays of equal length as tensors: inputs keep their type, targets become int64."""
    return Examples(
        inputs=torch.from_numpy(np.ascontiguousarray(inputs)),
        targets=torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64)),
        entities=None if entities is None else torch.from_numpy(entities),
    )


def slug(text: str) -> str:
    """`text` as a name in lower-case ASCII letters, digits and '-': "VA Long Beach" is "va-long-beach"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def group_rows(values: Sequence[str], *, where: str) -> tuple[tuple[str, ...], Integers]:
    """Slugs of the distinct `values` in their sorted order, and the index of each row's slug.

    A group whose name has no ASCII letter or digit is called by its place, such as "group-003".

    Raises:
        DataError: Two groups share a slug, so that their clients could not be told apart.
    """
    names, group_of = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    slugs = tuple(slug(name) or f"group-{i:03d}" for i, name in enumerate(names.tolist()))
    if len(set(slugs)) < len(slugs):
        raise DataError(
            f"{where}: {len(slugs)} groups have only {len(set(slugs))} names in letters, digits and '-'",
            hint="rename the groups so that they differ by more than case or punctuation",
        )
    return slugs, group_of.astype(np.int64)
