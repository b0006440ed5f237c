"""Tables: csv and parquet, one row an example."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from common.data.collection import Collection, Integers, as_examples, group_rows
from common.data.entities import known_name, number
from common.data.readers.labels import class_codes, standardise
from common.data.readers.optional import need
from common.errors import DataError
from common.schema import DataSchema
from common.site import DataSource

MISSING = ("", "?", "NA", "N/A", "<NA>", "NaN", "nan", "null", "NULL")
"""What a csv writes for a missing feature. A missing label or group is only ever an empty cell: "NA" can be a class.
`common.data.entities` says when an entity is missing."""


def read_table(source: DataSource, path: Path, *, labelled: bool) -> Collection:
    """A csv or parquet file as tabular examples.

    Features are `source.features`, or every numeric column but the label, the group and the entity. A column `id` that
    is not a feature names the rows; else they are numbered from 1. In training a row whose entity is not known is
    dropped.

    Raises:
        DataError: The file cannot be read, has no rows, lacks a column, or a feature is not numeric.
    """
    where = path.name
    kind = source.source.partition(":")[0]
    frame = read_frame(kind, path, as_text=(source.label, source.group, source.entity))
    rows = len(frame)
    if rows == 0:
        raise DataError(f"{where} has no rows", hint="the first line is the header")
    for column in (source.label, source.group, source.entity):
        if column and labelled and column not in frame:
            raise missing_column(column, list(frame), where=where)
    labels = _as_text(frame[source.label]) if source.label in frame else [None] * rows
    dropped = {}
    if labelled:
        groups = _as_text(frame[source.group]) if source.group else [""] * rows
        keep = np.array([label is not None for label in labels])
        grouped = np.array([group is not None for group in groups])
        owned = np.ones(rows, bool)
        if source.entity:
            owned = np.array([known_name(name) is not None for name in _as_text(frame[source.entity])])
        dropped = {
            "has no label": int((~keep).sum()),
            "has no group": int((keep & ~grouped).sum()),
            "has no entity": int((keep & grouped & ~owned).sum()),
        }
        frame = frame[keep & grouped & owned].reset_index(drop=True)
        labels = _as_text(frame[source.label])
        if not labels:
            if source.entity and (keep & grouped).any():
                raise no_entity(source.entity, where=where)
            raise DataError(f"{where}: no row has a label", hint=f"column `{source.label}` holds the class")
    columns, values, missing = _features(frame, source, where=where)
    class_names, targets = class_codes(labels, source, where=where)
    slugs: tuple[str, ...] = ()
    group_of: Integers | None = None
    if labelled and source.group:
        slugs, group_of = group_rows([str(group) for group in _as_text(frame[source.group])], where=where)
    entities = number(_as_text(frame[source.entity])) if labelled and source.entity else None
    named = "id" in frame and "id" not in columns
    return Collection(
        schema=DataSchema(
            kind="tabular",
            input_shape=(len(columns),),
            num_classes=len(class_names),
            class_names=class_names,
            feature_names=tuple(columns),
        ),
        examples=as_examples(standardise(values, source, axis_length=len(columns), where=where), targets, entities),
        row_ids=[str(v) for v in frame["id"].tolist()] if named else [str(i + 1) for i in range(len(frame))],
        groups=slugs,
        group_of=group_of,
        rows=rows,
        missing=missing,
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def read_frame(kind: str, path: Path, *, as_text: tuple[str, ...] = ()) -> Any:
    """A pandas frame of a csv (UTF-8, comma, header) or parquet file; columns `as_text` keep what the csv wrote.

    Raises:
        DataError: The file is missing or not of its kind. The library's own message is withheld: it can quote cells.
    """
    pandas = need("pandas", purpose=f"reading {kind}")
    try:
        if kind == "parquet":
            need("pyarrow", purpose="reading parquet")
            return pandas.read_parquet(path)
        header = [str(column) for column in pandas.read_csv(path, nrows=0, encoding="utf-8-sig").columns]
        return pandas.read_csv(
            path,
            encoding="utf-8-sig",
            dtype=dict.fromkeys([c for c in header if c in as_text], str),
            keep_default_na=False,
            na_values={c: [""] if c in as_text else list(MISSING) for c in header},
            low_memory=False,
        )
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", hint="check the path") from None
    except (OSError, ValueError):
        # pandas' and pyarrow's own errors are ValueErrors.
        hint = "save it as UTF-8 with commas and a header line" if kind == "csv" else "write it with a parquet library"
        raise DataError(f"{path} cannot be read as {kind}", hint=hint) from None


def missing_column(column: str, known: list[str], *, where: str) -> DataError:
    """The error for a column that is not there, naming the nearest that is."""
    near = difflib.get_close_matches(column, known, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {len(known)} columns: {', '.join(known[:8])}"
    return DataError(f"{where} has no column `{column}`", hint=hint)


def no_entity(column: str, *, where: str) -> DataError:
    """The error for a column that says of no row whose it is."""
    return DataError(f"{where}: no row has an entity", hint=f"`{column}` says whose each row is")


def _as_text(column: Any) -> list[str | None]:
    """Labels, groups or entities as text: whole numbers without a fraction, booleans in lower case, or None."""
    return [_cell_text(value) for value in column.astype(object).where(column.notna(), None).tolist()]


def _cell_text(value: object) -> str | None:
    """One label, group or entity as text."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def _features(frame: Any, source: DataSource, *, where: str) -> tuple[list[str], Any, dict[str, int]]:
    """The feature columns, their values (float64[n, k], NaN where missing), and how many are missing by column."""
    pandas = need("pandas", purpose="reading tables")
    others = {source.label, source.group, source.entity}
    names = source.features or [
        str(c) for c in frame if c not in others and pandas.api.types.is_numeric_dtype(frame[c].dtype)
    ]
    if not names:
        raise DataError(f"{where} has no numeric column", hint="name the inputs: features = [...]")
    if overlap := others.intersection(names):
        raise DataError(
            f"{where}: `{min(overlap)}` is both a feature and the label, group or entity", hint="list it once"
        )
    values = np.empty((len(frame), len(names)))
    missing = {}
    for i, name in enumerate(names):
        if name not in frame:
            raise missing_column(name, [str(c) for c in frame], where=where)
        numbers = pandas.to_numeric(frame[name], errors="coerce").astype("float64")
        if bad := int((numbers.isna() & frame[name].notna()).sum()):
            raise DataError(
                f"{where}: column `{name}` holds {bad} values that are not numbers",
                hint="leave it out of `features`, or write categories as 0-or-1 columns",
            )
        values[:, i] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
        if count := int(numbers.isna().sum()):
            missing[name] = count
    return names, values, missing
