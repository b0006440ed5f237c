"""A site's own data: one module for each kind of source that `site.toml` can name.

Used by `common.data.loading` only. Messages name files, columns and counts, never a value: a value can be a patient's.
"""

from __future__ import annotations

from pathlib import Path

from common.config.settings import DataSettings
from common.data.collection import Collection
from common.errors import DataError
from common.site import DataSource


def read(
    source: DataSource, path: Path, settings: DataSettings, *, labelled: bool, tolerant: bool = False
) -> Collection:
    """The examples at `path`, in the format that `source` names.

    Args:
        source: How the file is read; its own path is not used.
        path: The file, or the folder of images.
        settings: `sequence_length` and `test_fraction` for text.
        labelled: True for training: labels must be there, and rows without one are dropped. False for prediction:
            labels may be absent, every row is kept.
        tolerant: Whether text that is too short for one example of `settings` is data without examples.

    Raises:
        DataError: The source cannot be read or does not fit its description.
    """
    from common.data.readers.arrays import read_arrays
    from common.data.readers.images import read_images
    from common.data.readers.table import read_table
    from common.data.readers.text import read_text

    kind = source.source.partition(":")[0]
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="check the path; in site.toml it starts from that file's folder")
    if kind == "images":
        return read_images(source, path, labelled=labelled)
    if kind == "npz":
        return read_arrays(source, path, labelled=labelled)
    if kind == "text":
        return read_text(source, path, settings, labelled=labelled, tolerant=tolerant)
    return read_table(source, path, labelled=labelled)
