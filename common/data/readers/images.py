"""Images: a folder with one sub-folder a class, or, for prediction, a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.data.collection import UNLABELLED, Collection, as_examples
from common.data.readers.labels import class_codes, standardise
from common.data.readers.optional import need
from common.errors import DataError
from common.schema import DataSchema
from common.site import DataSource

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
MOST_PIXELS = 100_000_000
"""Larger files are refused before they are unpacked: a small file can claim to be a picture that fills the memory."""


def read_images(source: DataSource, path: Path, *, labelled: bool) -> Collection:
    """Every image below `path`, in the order of class and file name, resized to float32[channels, size, size].

    Without declared `classes`, the folders' names are the classes.

    Raises:
        DataError: There is no image, a folder is not a declared class, or an image cannot be read.
    """
    where = path.name
    if not path.is_dir():
        raise DataError(f"{path} is not a folder", hint="images lie in one folder a class")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    folders = [p.relative_to(path).parts[0] if p.parent != path else None for p in files]
    if labelled:
        files = [p for p, folder in zip(files, folders, strict=True) if folder is not None]
        folders = [folder for folder in folders if folder is not None]
    if not files:
        raise DataError(f"{where} has no images", hint="put them in one folder a class, as png or jpg")
    if labelled and not source.classes:
        # A class folder without images is still a class.
        names = sorted(p.name for p in path.iterdir() if p.is_dir())
        source = source.model_copy(update={"classes": names})
    if not labelled:
        folders = [folder if folder in source.classes else None for folder in folders]
    class_names, targets = class_codes(folders, source, where=where)
    size, channels = source.image_size, source.channels
    pixels = np.empty((len(files), size, size, channels), np.float64)
    broken = 0
    for i, file in enumerate(files):
        image = _read(file, size=size, channels=channels)
        if image is None:
            broken += 1
        else:
            pixels[i] = image
    if broken:
        raise DataError(
            f"{where}: {broken} of {len(files)} images cannot be read", hint="remove damaged or very large files"
        )
    inputs = np.moveaxis(standardise(pixels, source, axis_length=channels, where=where), -1, 1)
    return Collection(
        schema=DataSchema(
            kind="image",
            input_shape=(channels, size, size),
            num_classes=len(class_names),
            class_names=class_names,
        ),
        examples=as_examples(inputs, targets if labelled or source.classes else np.full(len(files), UNLABELLED)),
        row_ids=[str(p.relative_to(path)) for p in files],
        rows=len(files),
    )


def _read(file: Path, *, size: int, channels: int) -> Any:
    """float64[size, size, channels] in 0..1, or None if the file is no image that can be read."""
    pillow = need("PIL.Image", purpose="reading images")
    try:
        with pillow.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            resized = image.convert("L" if channels == 1 else "RGB").resize((size, size), pillow.Resampling.BILINEAR)
            return np.asarray(resized, np.float64).reshape(size, size, channels) / 255.0
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        return None  # counted by the caller; Pillow's message names the file, and a file can be named after a patient
