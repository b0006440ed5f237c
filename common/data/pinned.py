"""Files whose content is known beforehand, by SHA-256: those that come with Coterie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import DataError

VENDORED: Mapping[str, str] = {
    "heart_disease_uci.csv": "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "shakespeare_roles.json.gz": "33195c9343d6b24b8804d0f323b07efab3db201fa022a5becdee82d7c261784f",
}
"""SHA-256 of every file in `files/`; its ATTRIBUTION.md says whose they are."""

FILES = Path(__file__).parent / "files"


def vendored(name: str) -> bytes:
    """Content of a file that comes with Coterie.

    Raises:
        DataError: It is missing or damaged.
    """
    hint = "reinstall Coterie: pip install --force-reinstall --no-deps coterie"
    try:
        content = (FILES / name).read_bytes()
    except OSError as e:
        raise DataError(f"{name}, which comes with Coterie, cannot be read: {e.strerror}", hint=hint) from e
    if hashlib.sha256(content).hexdigest() != VENDORED[name]:
        raise DataError(f"{name}, which comes with Coterie, is damaged: its SHA-256 is not the known one", hint=hint)
    return content


def cache_folder() -> Path:
    """Where fetched data is kept: the environment's COTERIE_DATA, or ~/.cache/coterie."""
    chosen = os.environ.get("COTERIE_DATA", "")
    return Path(chosen) if chosen else Path.home() / ".cache" / "coterie"


def parse_idx(raw: bytes) -> npt.NDArray[np.uint8]:
    """The array in an unpacked idx file of unsigned bytes (the format of MNIST).

    Only for content whose hash was checked: the header is believed.
    """
    ndim = raw[3]
    shape = np.frombuffer(raw, ">u4", count=ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape.astype(np.int64))
