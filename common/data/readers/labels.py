"""Labels, public constants and finiteness: what tables, arrays and images have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.data.collection import UNLABELLED, Floats, Integers
from common.errors import DataError
from common.site import DataSource


def class_codes(labels: Sequence[str | None], source: DataSource, *, where: str) -> tuple[tuple[str, ...], Integers]:
    """Class names, and int64[n] with each label's class or -1 where there is none.

    Without declared `classes`, the distinct labels in order (as numbers, if all are whole numbers) are the classes;
    to name such a file in `site.toml` is to declare them public.

    Raises:
        DataError: A label is not among the declared classes.
    """
    present = {label for label in labels if label is not None}
    if not source.classes:
        names = sorted(present, key=int) if all(map(_whole, present)) else sorted(present)
        codes = {name: i for i, name in enumerate(names)}
    else:
        names = list(source.classes)
        codes = {name: i for i, name in enumerate(names)}
        if len(codes) < len(names):
            raise DataError(f"{where}: `classes` names a class twice", hint="list each class once")
        if unknown := sum(label is not None and label not in codes for label in labels):
            raise DataError(
                f"{where}: {unknown} labels are none of the {len(names)} declared classes",
                hint="declare every class, exactly as it is written in the data: classes = [...]",
            )
    targets = [UNLABELLED if label is None else codes[label] for label in labels]
    return tuple(names), np.asarray(targets, dtype=np.int64)


def _whole(text: str) -> bool:
    """Whether a label is a whole number in plain digits."""
    return text.removeprefix("-").isdecimal() and text.isascii()


def standardise(values: npt.NDArray[np.float64], source: DataSource, *, axis_length: int, where: str) -> Floats:
    """`(values - means) / scales` along the last axis, NaN (missing) becoming 0, as float32.

    A missing value thus becomes the declared mean, or plain 0 where no means are declared.

    Raises:
        DataError: Constants of the wrong number, a scale that is not positive, or values that are not finite.
    """
    for name, constants in (("means", source.means), ("scales", source.scales)):
        if constants and len(constants) != axis_length:
            raise DataError(
                f"{where}: `{name}` has {len(constants)} numbers for {axis_length} features",
                hint="give one for each feature in the order of `features` (one a channel for images), or none",
            )
        if not np.isfinite(constants).all():
            raise DataError(f"{where}: `{name}` holds a number that is not finite", hint="give plain numbers")
    if source.scales and min(source.scales) <= 0:
        raise DataError(f"{where}: `scales` holds a number that is not positive", hint="values are divided by it")
    shifted = values - np.asarray(source.means or [0.0])
    with np.errstate(over="ignore"):
        scaled = (shifted / np.asarray(source.scales or [1.0])).astype(np.float32)
    if infinite := int(np.isinf(scaled).sum()):
        raise DataError(f"{where}: {infinite} values are not finite numbers", hint="leave a cell empty if unknown")
    filled: Floats = np.nan_to_num(scaled, nan=0.0)
    return filled
