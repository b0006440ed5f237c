"""Noise drawn ahead of time, by a thread, while the model computes."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.noise import NoiseSource


class Prefetch:
    """A source that has the next `count` integers drawn by a thread; anything else comes straight from `source`.

    Guarantee: That of `source`. What was drawn ahead is handed out once or not at all. If every request is for `count`,
    the integers are those that `source` alone would have given; in any case they do not depend on timing. At most one
    draw is held ahead. The thread ends with `close`, with this object, or with the process, whichever comes first, and
    an error in it is raised where its integers are asked for. After a fork the child is refused.

    Args:
        source: Where all comes from; nobody else may draw integers from it meanwhile.
        count: How many integers one step takes.
        batches: How many draws of `count` will be asked for, so that none is made for nothing; None for no end.
    """

    def __init__(self, source: NoiseSource, *, count: int, batches: int | None = None) -> None:
        self._source, self._count, self._left = source, count, batches
        self._process = os.getpid()
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._ahead: Future[NDArray[np.int32]] | None = None
        self._draw_ahead()

    def __repr__(self) -> str:
        """Without what was drawn."""
        return "Prefetch()"

    def __enter__(self) -> Self:
        """For a `with` block that ends with `close`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def integers(self, count: int) -> NDArray[np.int32]:
        """int32[count] independent values of the discrete Gaussian with parameter GRID_STDDEV."""
        self._check_process()
        with self._lock:
            ahead = self._ahead
            if ahead is None:
                return self._source.integers(count)
            if count != self._count:
                wait([ahead])
                return self._source.integers(count)
            self._ahead = None
            values = ahead.result()
            self._draw_ahead()
            return values

    def words(self, count: int) -> NDArray[np.uint64]:
        """uint64[count] of random bits."""
        self._check_process()
        return self._source.words(count)

    def close(self) -> None:
        """End the thread and drop what it drew; later requests are answered by `source`. May be called again."""
        here = os.getpid() == self._process
        self._thread.shutdown(wait=here, cancel_futures=here)
        self._ahead = None

    def _draw_ahead(self) -> None:
        if self._left == 0:
            return
        if self._left is not None:
            self._left -= 1
        self._ahead = self._thread.submit(self._source.integers, self._count)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise PrivacyError("a noise source was used after a fork", hint="make a new source in each process")
