"""The mean, formed while replies arrive: memory of the model, not of clients times the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.flower import ARRAYS, METRICS, WEIGHT, arrays_of, metrics_of, to_record
from server.grids.base import WrappingGrid, stream_replies


class FoldingGrid(WrappingGrid):
    """Answers a strategy that needs only the mean with one reply that holds it.

    Guarantee: replies are folded in the order of the messages, whatever the order of arrival, in float64; the result is
    the same to the bit for any number of workers. A strategy that takes the weighted mean of the replies gets what it
    would have computed from all of them, up to float32 rounding. Failed replies pass through.
    """

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The failed replies as they arrive, then one reply with the mean of the others, if there are any."""
        messages = list(messages)
        order = [message.metadata.dst_node_id for message in messages]
        early: dict[int, Message] = {}
        mean = _Mean()
        next_place = 0
        for reply in stream_replies(self._inner, messages, timeout):
            early[reply.metadata.src_node_id] = reply
            if reply.has_error():
                yield reply
            while next_place < len(order) and order[next_place] in early:
                mean.add(early.pop(order[next_place]))
                next_place += 1
        for node in order[next_place:]:
            if node in early:
                mean.add(early.pop(node))
        if mean.weight > 0:
            yield mean.reply()


class _Mean:
    """Weighted sum of arrays and metrics in float64."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._first: Message | None = None
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._dtypes: Mapping[str, np.dtype[Any]] = {}
        self._metrics: dict[str, float] = {}

    def add(self, reply: Message) -> None:
        if reply.has_error():
            return
        metrics = metrics_of(reply.content)
        weight = np.float64(metrics[WEIGHT])  # type: ignore[arg-type]
        arrays = arrays_of(reply.content)
        if self._first is None:
            self._first = reply
            self._sums = {name: values * weight for name, values in arrays.items()}
            self._dtypes = {name: values.dtype for name, values in arrays.items()}
        else:
            for name, values in arrays.items():
                self._sums[name] += values * weight
        self.weight += float(weight)
        for name, value in metrics.items():
            if name != WEIGHT and isinstance(value, int | float):
                self._metrics[name] = self._metrics.get(name, 0.0) + float(weight) * value

    def reply(self) -> Message:
        """One reply that stands for all that were added."""
        if self._first is None:
            raise ValueError("nothing was added")
        arrays = {name: _cast(total / self.weight, self._dtypes[name]) for name, total in self._sums.items()}
        metrics = {name: total / self.weight for name, total in self._metrics.items()}
        content = RecordDict({ARRAYS: to_record(arrays), METRICS: MetricRecord({WEIGHT: self.weight, **metrics})})
        return Message(content, metadata=self._first.metadata)  # type: ignore[call-overload,no-any-return]


def _cast(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """In the model's dtype; a mean of integers is rounded, as `strategies.cast_like` does."""
    return np.asarray(np.rint(values) if dtype.kind in "iu" else values, dtype=dtype)
