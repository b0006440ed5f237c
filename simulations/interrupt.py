"""Ctrl-C that is not lost.

Python raises `KeyboardInterrupt` wherever it happens to be. In a destructor or in a weak reference's callback, which an
import runs, the exception is printed and dropped: the run would go on as if nobody had asked it to stop.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lost = threading.Event()


@contextmanager
def interruptible() -> Iterator[None]:
    """Remember an interrupt that Python drops while the block runs; `check_interrupt` raises it again."""
    others = sys.unraisablehook

    def remember(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _lost.set()
        else:
            others(unraisable)

    sys.unraisablehook = remember
    try:
        yield
    finally:
        sys.unraisablehook = others
        _lost.clear()


def check_interrupt() -> None:
    """Called wherever a run could wait or go on for long.

    Raises:
        KeyboardInterrupt: One was dropped.
    """
    if _lost.is_set():
        _lost.clear()
        raise KeyboardInterrupt
