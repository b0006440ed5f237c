"""Looks for weights in clear in whatever bytes somebody keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 64
"""Bytes in a row that are a leak."""
_WORD = 8
_LEAST_DIFFERENT = 16
"""Values of a byte in a window that is worth looking for: rows of zeros are everywhere."""


class Plaintext:
    """Some arrays' bytes: every stretch of 64 of them is looked for, at any place."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        windows: dict[bytes, set[bytes]] = {}
        for values in arrays:
            data = values.tobytes()
            for start in range(len(data) - WINDOW + 1):
                window = data[start : start + WINDOW]
                if len(set(window)) >= _LEAST_DIFFERENT:
                    windows.setdefault(window[:_WORD], set()).add(window)
        assert windows, "there is nothing to look for"
        self._windows = windows
        self._words = np.unique(np.frombuffer(b"".join(windows), np.uint64))

    def found_in(self, data: bytes) -> bool:
        """Whether 64 bytes in a row of these arrays are in `data`."""
        for offset in range(_WORD):
            words = np.frombuffer(data, np.uint64, max(0, len(data) - offset) // _WORD, offset)
            for place in np.flatnonzero(np.isin(words, self._words)):
                start = offset + int(place) * _WORD
                if data[start : start + WINDOW] in self._windows.get(data[start : start + _WORD], ()):
                    return True
        return False
