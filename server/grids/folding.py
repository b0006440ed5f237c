"""The mean, formed while replies arrive: memory of the model, not of clients times the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.flower import ARRAYS, METRICS, WEIGHT, arrays_of, metrics_of, to_record
from server.grids.base import WrappingGrid, stream_replies
from server.grids.spooling import IN_MEMORY_BYTES, Shelf

_BLOCK: Final = 1 << 16
"""Values that are weighed at a time: their float64 products stay in a core's own cache."""


class FoldingGrid(WrappingGrid):
    """Answers a strategy that needs only the mean with one reply that holds it.

    Guarantee: replies are folded in the order of the messages, whatever the order of arrival, in float64; the result is
    the same to the bit for any number of workers. A strategy that takes the weighted mean of the replies gets what it
    would have computed from all of them, up to float32 rounding. Failed replies pass through. Beside the sum there is
    one reply in memory, and of those that came early at most `in_memory` bytes; the others wait on disk.
    """

    def __init__(self, inner: Grid, *, folder: Path | None = None, in_memory: int = IN_MEMORY_BYTES) -> None:
        """Prepare one round.

        Args:
            inner: A grid that lets only sound replies pass.
            folder: Where early replies wait beyond `in_memory` bytes; None takes the system's temporary files.
            in_memory: Bytes of early replies that need no disk.
        """
        super().__init__(inner)
        self._folder = folder
        self._in_memory = in_memory

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The failed replies as they arrive, then one reply with the mean of the others, if there are any."""
        messages = list(messages)
        order = [message.metadata.dst_node_id for message in messages]
        early = Shelf(folder=self._folder, in_memory=self._in_memory)
        mean = _Mean()
        next_place = 0
        for reply in stream_replies(self._inner, messages, timeout):
            if reply.has_error():
                yield reply
            if next_place < len(order) and order[next_place] == reply.metadata.src_node_id:
                mean.add(reply)
                next_place += 1
            else:
                early.put(reply.metadata.src_node_id, reply)
            del reply  # or it stays in memory while the next one arrives
            while next_place < len(order) and order[next_place] in early:
                mean.add(early.take(order[next_place]))
                next_place += 1
        for node in order[next_place:]:
            if node in early:
                mean.add(early.take(node))
        if mean.weight > 0:
            yield mean.reply()


class _Mean:
    """Weighted sum of arrays and metrics in float64."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._metadata: Metadata | None = None
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._metrics: dict[str, float] = {}
        self._scratch = np.empty(0)

    def add(self, reply: Message) -> None:
        """Add one reply; nothing of it is kept."""
        if reply.has_error():
            return
        metrics = metrics_of(reply.content)
        weight = np.float64(metrics[WEIGHT])  # type: ignore[arg-type]
        arrays = arrays_of(reply.content)
        if self._metadata is None:
            self._metadata = reply.metadata
            self._sums = {name: np.multiply(values, weight, order="C") for name, values in arrays.items()}
            self._dtypes = {name: values.dtype for name, values in arrays.items()}
        else:
            for name, values in arrays.items():
                if values.size <= _BLOCK:
                    self._sums[name] += values * weight
                else:
                    self._add_blocks(self._sums[name].reshape(-1), values.reshape(-1), weight)
        self.weight += float(weight)
        for name, value in metrics.items():
            if name != WEIGHT and isinstance(value, int | float):
                self._metrics[name] = self._metrics.get(name, 0.0) + float(weight) * value

    def _add_blocks(self, total: NDArray[np.float64], values: NDArray[Any], weight: np.float64) -> None:
        """`total += values * weight`, to the bit, without all products in memory at once."""
        if not self._scratch.size:
            self._scratch = np.empty(_BLOCK)
        for start in range(0, total.size, _BLOCK):
            part = total[start : start + _BLOCK]
            products = np.multiply(values[start : start + _BLOCK], weight, out=self._scratch[: part.size])
            np.add(part, products, out=part)

    def reply(self) -> Message:
        """One reply that stands for all that were added. Takes the sums with it."""
        if self._metadata is None:
            raise ValueError("nothing was added")
        arrays = {}
        for name, dtype in self._dtypes.items():
            total = self._sums.pop(name)  # each sum is let go of before the next is cast
            arrays[name] = _cast(np.divide(total, self.weight, out=total if total.shape else None), dtype)
            del total
        metrics = {name: total / self.weight for name, total in self._metrics.items()}
        content = RecordDict({ARRAYS: to_record(arrays), METRICS: MetricRecord({WEIGHT: self.weight, **metrics})})
        return Message(content, metadata=self._metadata)  # type: ignore[call-overload,no-any-return]


def _cast(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """In the model's dtype; a mean of integers is rounded, as `strategies.cast_like` does."""
    return np.asarray(np.rint(values) if dtype.kind in "iu" else values, dtype=dtype)
