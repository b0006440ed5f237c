"""npz: numpy arrays of inputs and labels. Never unpickled: `allow_pickle` is off."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from common.data.collection import UNLABELLED, Collection, Floats, Integers, as_examples, group_rows
from common.data.entities import known_name, number
from common.data.readers.labels import standardise
from common.data.readers.table import missing_column, no_entity
from common.errors import DataError
from common.schema import DataSchema
from common.site import DataSource


def read_arrays(source: DataSource, path: Path, *, labelled: bool) -> Collection:
    """Arrays of an npz file: two axes are a table, three grey images, four images [n, channels, height, width].

    Bytes (uint8) are divided by 255; `means` and `scales` count features of a table, channels of images. Labels are
    whole numbers from 0. Without declared `classes` there are as many as the largest label says, which the site thereby
    declares public. Entities are strings or whole numbers; in training an example whose entity is not known is dropped.

    Raises:
        DataError: The file is no npz, would need unpickling, lacks an array, or its arrays do not fit together.
    """
    where = path.name
    companions = [name for name in (source.group, source.entity) if name and labelled]
    arrays = _load(path, [source.inputs, source.label, *companions])
    if source.inputs not in arrays:
        raise missing_column(source.inputs, sorted(arrays), where=where)
    inputs = _inputs(arrays[source.inputs], source, where=where)
    if len(inputs) == 0:
        raise DataError(f"{where} has no rows", hint=f"array `{source.inputs}` holds one example a row")
    if source.label in arrays:
        targets = _targets(arrays[source.label], len(inputs), source, where=where)
    elif labelled:
        raise missing_column(source.label, sorted(arrays), where=where)
    else:
        targets = np.full(len(inputs), UNLABELLED, np.int64)
    for name in companions:
        if name not in arrays:
            raise missing_column(name, sorted(arrays), where=where)
        _same_length(arrays[name], len(inputs), name, where=where)
    kept, entities = np.arange(len(inputs)), None
    if labelled and source.entity:
        kept, entities = _entities(arrays[source.entity], source.entity, where=where)
        inputs, targets = inputs[kept], targets[kept]
    slugs: tuple[str, ...] = ()
    group_of: Integers | None = None
    if labelled and source.group:
        slugs, group_of = group_rows([str(v) for v in arrays[source.group][kept].tolist()], where=where)
    rows = len(arrays[source.inputs])
    table = inputs.ndim == 2
    return Collection(
        schema=DataSchema(
            kind="tabular" if table else "image",
            input_shape=inputs.shape[1:],
            num_classes=len(source.classes) or max(int(targets.max()) + 1, 0),
            class_names=tuple(source.classes),
            feature_names=tuple(source.features) if table and len(source.features) == inputs.shape[1] else (),
        ),
        examples=as_examples(inputs, targets, entities),
        row_ids=[str(i) for i in kept],
        groups=slugs,
        group_of=group_of,
        rows=rows,
        dropped={"has no entity": rows - len(kept)} if rows > len(kept) else {},
    )


def _load(path: Path, names: list[str]) -> dict[str, Any]:
    """The named arrays that the file has; where one is missing, all names with empty arrays for the hint."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] if name in names else np.empty(0) for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        raise DataError(
            f"{path} cannot be read as npz without unpickling", hint="write plain arrays with numpy.savez"
        ) from None


def _inputs(array: Any, source: DataSource, *, where: str) -> Floats:
    """float32 inputs: [n, features] or [n, channels, height, width]."""
    if array.dtype.kind not in "biuf" or array.ndim not in {2, 3, 4}:
        raise DataError(
            f"{where}: array `{source.inputs}` has {array.ndim} axes of type {array.dtype}",
            hint="give numbers as [n, features], [n, height, width] or [n, channels, height, width]",
        )
    values = array.astype(np.float64) / (255.0 if array.dtype == np.uint8 else 1.0)
    if not np.isfinite(values).all():
        raise DataError(f"{where}: array `{source.inputs}` holds values that are not finite", hint="remove them")
    if values.ndim == 2:
        return standardise(values, source, axis_length=values.shape[1], where=where)
    if values.ndim == 3:
        values = values[:, None]
    last = standardise(np.moveaxis(values, 1, -1), source, axis_length=values.shape[1], where=where)
    return np.ascontiguousarray(np.moveaxis(last, -1, 1))


def _targets(array: Any, rows: int, source: DataSource, *, where: str) -> Integers:
    """int64[n] labels inside the declared range."""
    _same_length(array, rows, source.label, where=where)
    if array.dtype.kind not in "biu":
        raise DataError(f"{where}: array `{source.label}` is of type {array.dtype}", hint="labels are whole numbers")
    targets: Integers = array.astype(np.int64)
    outside = int((targets < 0).sum()) + (int((targets >= len(source.classes)).sum()) if source.classes else 0)
    if outside:
        raise DataError(
            f"{where}: {outside} labels lie outside 0..{len(source.classes) - 1 if source.classes else 'n'}",
            hint="labels count from 0; declare every class: classes = [...]",
        )
    return targets


def _entities(array: Any, name: str, *, where: str) -> tuple[Integers, Integers]:
    """The examples whose entity is known, and their entities."""
    if array.dtype.kind not in "iuU":
        raise DataError(
            f"{where}: array `{name}` is of type {array.dtype}", hint="entities are strings or whole numbers"
        )
    names = [known_name(str(value)) for value in array.tolist()]
    kept = np.flatnonzero([known is not None for known in names])
    if not len(kept):
        raise no_entity(name, where=where)
    return kept, number([names[i] for i in kept])


def _same_length(array: Any, rows: int, name: str, *, where: str) -> None:
    """Refuse a companion array that does not hold one value an example."""
    if array.shape != (rows,):
        raise DataError(
            f"{where}: array `{name}` has shape {array.shape} for {rows} examples", hint="give one value an example"
        )
