"""What names a model: a digest of its arrays. A request that is asked again, over the same model, is known by it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LABEL = b"coterie model digest v1"


def model_digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 over names, dtypes, shapes and bytes of all arrays, in their order: 32 bytes.

    Guarantee: different arrays are never hashed as the same bytes: every part has a length or is followed by one.
    """
    digest = hashlib.sha256(_LABEL)
    for name, values in arrays.items():
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        digest.update(f"{len(name)}/{name}/{values.dtype.name}/{values.shape}/".encode())
        digest.update(little.reshape(-1).view(np.uint8).data if little.size else b"")
    return digest.digest()
