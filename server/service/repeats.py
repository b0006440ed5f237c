"""A peer that comes and goes all the time must not fill the audit log: so many lines of it are written in a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 20
"""Lines of one peer within `SECONDS`."""
SECONDS: Final = 600.0


class Repeats:
    """Counts what each peer did; thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, int]] = {}

    def left_out(self, peer: str) -> int | None:
        """Count once more: None if there have been too many to tell, else how many were not told before this one."""
        now = self._clock()
        with self._lock:
            begun, count = self._seen.get(peer, (now, 0))
            untold = 0
            if now - begun >= SECONDS:
                untold, begun, count = max(0, count - MOST), now, 0
            self._seen[peer] = (begun, count + 1)
            return untold if count < MOST else None
