"""A round's masks, for one update, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from common.secagg.masks import MaskKey, apply_masks
from common.secagg.refusal import SecAggError


class Mask:
    """What hides one update in one round.

    Attributes:
        header: The round's digest.
        participants: How many members were asked.

    Guarantee:
        One vector is masked, ever: the keys are dropped by the first `apply`.
    """

    __slots__ = ("_done", "_keys", "header", "participants")

    def __init__(self, header: bytes, participants: int, keys: Sequence[MaskKey], done: Callable[[], None]) -> None:
        self.header, self.participants = header, participants
        self._keys: tuple[MaskKey, ...] = tuple(keys)
        self._done = done

    def apply(self, vector: npt.NDArray[np.uint32]) -> None:
        """Mask uint32[n] in place, mod 2^32.

        Raises:
            SecAggError: `index`: a vector was masked before.
            ValueError: The vector is not C-contiguous, writable uint32[n]; then it can be tried again.
        """
        if not self._keys:
            raise SecAggError("index", "an update was masked in this round before", hint="train again in a new round")
        apply_masks(vector, self._keys)
        self._keys = ()
        self._done()

    def __repr__(self) -> str:
        return f"Mask(header={self.header.hex()}, participants={self.participants})"
