"""`heart`: 918 patients of four hospitals (UCI data set 45); does a patient have coronary disease?

The target is `num > 0`: a major vessel narrowed by more than half.

Known defects of the published file, and what is done about them:

- the row with id 304 is labelled Cleveland but is Hungary's: it is moved;
- two rows repeat another patient in everything but their id: they are dropped (920 rows become 918);
- cholesterol 0 (all of Switzerland's) and blood pressure 0 mean "not measured";
- `ca`, `thal` and `slope` are missing in up to 99 % of rows outside Cleveland: they are not used.

Measurements are standardised with `STANDARD`, round figures that a clinician would give for middle-aged patients; they
are written here and never computed from the data, so they reveal nothing about anybody. A missing measurement becomes
0, the middle of its scale; a missing answer becomes 0 and so does every column of a missing category. Three more
columns say that cholesterol, fasting blood sugar and blood pressure were not taken. That is informative: hospitals
differ in what they measure, and patients without an exercise test mostly lack their blood pressure too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.data.collection import UNLABELLED, Collection, Floats, Integers, as_examples, group_rows, slug
from common.data.pinned import vendored
from common.data.readers.table import missing_column, read_frame
from common.errors import DataError
from common.schema import DataSchema

Row = Mapping[str, str]

STANDARD: Mapping[str, tuple[float, float]] = {
    "age": (55, 10),  # years
    "trestbps": (130, 20),  # resting systolic blood pressure, mmHg
    "chol": (230, 50),  # serum cholesterol, mg/dl
    "thalch": (140, 25),  # highest heart rate in the exercise test, beats a minute
    "oldpeak": (1, 1),  # ST depression induced by exercise, mm
}
"""Public centre and scale of each measurement."""

ANSWERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sex": (("female", "0"), ("male", "1")),
    "fbs": (("false", "0"), ("true", "1")),  # fasting blood sugar above 120 mg/dl
    "exang": (("false", "0"), ("true", "1")),  # angina during exercise
}
"""How 0 and 1 are written in each yes-or-no column."""

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
}
ZERO_IS_MISSING = ("chol", "trestbps")
INDICATORS = ("chol", "fbs", "trestbps")
COLUMNS = (*STANDARD, *ANSWERS, *CATEGORIES)
MISSING = frozenset({"", "?", "na", "nan"})

SCHEMA = DataSchema(
    kind="tabular",
    input_shape=(18,),
    num_classes=2,
    class_names=("healthy", "disease"),
    feature_names=(
        *STANDARD,
        *ANSWERS,
        *(f"{column}={slug(value)}" for column, values in CATEGORIES.items() for value in values),
        *(f"{column}-missing" for column in INDICATORS),
    ),
)


def load() -> Collection:
    """The published file, mended as this module's docstring says; its groups are the four hospitals.

    Raises:
        DataError: The file is missing or damaged.
    """
    published = _parse(vendored("heart_disease_uci.csv").decode("utf-8"))
    rows: list[Row] = []
    seen = set()
    for row in published:
        if row["id"] == "304":
            row["dataset"] = "Hungary"
        patient = tuple(value for column, value in row.items() if column != "id")
        if patient not in seen:
            seen.add(patient)
            rows.append(row)
    groups, group_of = group_rows([row["dataset"] for row in rows], where="heart")
    inputs, missing = encode(rows)
    return Collection(
        schema=SCHEMA,
        examples=as_examples(inputs, _targets(rows)),
        row_ids=[row["id"] for row in rows],
        groups=groups,
        group_of=group_of,
        rows=len(published),
        missing=missing,
        dropped={"repeats another row": len(published) - len(rows)},
        repaired={"moved to the hospital it belongs to": 1},
    )


def read_new(kind: str, path: Path) -> Collection:
    """Other patients in the published file's layout (csv or parquet); `num` may be absent, nothing is dropped.

    Raises:
        DataError: The file cannot be read, lacks a column, or holds a value that its column does not allow.
    """
    if kind == "csv":
        try:
            rows = _parse(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist", hint="check the path") from None
        except (OSError, UnicodeDecodeError, csv.Error):
            raise DataError(f"{path} cannot be read as CSV", hint="save it as UTF-8 with a header line") from None
    else:
        frame = read_frame(kind, path)
        rows = [
            {str(k): "" if v != v or v is None else str(v) for k, v in record.items()}  # noqa: PLR0124 - NaN test
            for record in frame.to_dict("records")
        ]
    if not rows:
        raise DataError(f"{path} has no rows", hint="the first line is the header")
    for column in COLUMNS:
        if column not in rows[0]:
            raise missing_column(column, list(rows[0]), where=str(path))
    inputs, missing = encode(rows)
    return Collection(
        schema=SCHEMA,
        examples=as_examples(inputs, _targets(rows)),
        row_ids=[row.get("id") or str(i + 1) for i, row in enumerate(rows)],
        rows=len(rows),
        missing=missing,
    )


def encode(rows: Sequence[Row]) -> tuple[Floats, dict[str, int]]:
    """float32[n, 18] in the order of `SCHEMA.feature_names`, and the number of missing values by column."""
    features: list[npt.NDArray[np.float64]] = []
    absent: dict[str, npt.NDArray[np.bool_]] = {}
    for column, (centre, scale) in STANDARD.items():
        values = _column(rows, column, _number)
        if column in ZERO_IS_MISSING:
            values[values == 0] = np.nan
        absent[column] = np.isnan(values)
        features.append(np.nan_to_num((values - centre) / scale))
    for column, (no, yes) in ANSWERS.items():
        values = _column(rows, column, _choice((no, yes)))
        absent[column] = np.isnan(values)
        features.append(np.nan_to_num(values))
    for column, names in CATEGORIES.items():
        values = _column(rows, column, _choice(tuple((name,) for name in names)))
        absent[column] = np.isnan(values)
        features.extend((values == code).astype(np.float64) for code in range(len(names)))
    features.extend(absent[column].astype(np.float64) for column in INDICATORS)
    return np.stack(features, axis=1).astype(np.float32), {k: int(v.sum()) for k, v in absent.items() if v.any()}


def _parse(text: str) -> list[dict[str, str]]:
    """The rows of a CSV text; cells beyond the header are refused."""
    rows = list(csv.DictReader(io.StringIO(text), restval=""))
    if long := sum(None in row for row in rows):
        raise DataError(f"heart: {long} rows have more cells than the header", hint="quote cells that hold a comma")
    return rows


def _column(rows: Sequence[Row], column: str, read: Callable[[str], float]) -> npt.NDArray[np.float64]:
    """float64[n] of one column, NaN where missing; counts what `read` cannot take instead of quoting it."""
    values, bad = np.full(len(rows), np.nan), 0
    for i, row in enumerate(rows):
        text = row[column].strip().lower()
        if text in MISSING:
            continue
        try:
            values[i] = read(text)
        except ValueError:
            bad += 1
    if bad:
        raise DataError(
            f"heart: column `{column}` holds {bad} values that are not allowed there",
            hint=f"allowed: {_allowed(column)}, or nothing where it was not measured",
        )
    return values


def _allowed(column: str) -> str:
    """What a column takes, for people."""
    if column in CATEGORIES:
        return ", ".join(CATEGORIES[column])
    return " or ".join(names[0] for names in ANSWERS[column]) if column in ANSWERS else "numbers"


def _number(text: str) -> float:
    """A finite number; ValueError for anything else."""
    value = float(text)
    if not np.isfinite(value) or abs(value) > 1e6:
        raise ValueError
    return value


def _choice(options: tuple[tuple[str, ...], ...]) -> Callable[[str], float]:
    """Reads a text as the place of the option that lists it; ValueError if none does."""
    places = {name: float(i) for i, names in enumerate(options) for name in names}

    def read(text: str) -> float:
        if text not in places:
            raise ValueError
        return places[text]

    return read


def _targets(rows: Sequence[Row]) -> Integers:
    """int64[n]: 1 for disease, 0 for none, -1 where `num` is not given."""
    if "num" not in rows[0]:
        return np.full(len(rows), UNLABELLED, np.int64)
    num = _column(rows, "num", _number)
    return np.where(np.isnan(num), UNLABELLED, num > 0).astype(np.int64)
