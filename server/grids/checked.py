"""Lets only sound replies pass: what a client sends is not trusted to fit the model, or to be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import FailureCode
from common.flower import WEIGHT, arrays_of, failure_of, failure_reply, metrics_of
from server.grids.base import WrappingGrid, stream_replies


class CheckedGrid(WrappingGrid):
    """Turns a reply that does not fit into a typed failure, and tells `on_reply` of each reply's fate.

    Guarantee: a reply that passes has exactly the template's arrays (names, shapes, dtypes), all values finite, and one
    weight that is finite and positive; with `equal_weights` it is 1.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        template: Mapping[str, NDArray[Any]],
        equal_weights: bool,
        on_reply: Callable[[Message, FailureCode | None], None],
    ) -> None:
        super().__init__(inner)
        self._shapes = {name: (values.shape, values.dtype) for name, values in template.items()}
        self._equal_weights = equal_weights
        self._on_reply = on_reply

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, unsound ones as failures; a client that never answers is a failure too."""
        waiting = {message.metadata.dst_node_id: message for message in messages}
        for reply in stream_replies(self._inner, list(waiting.values()), timeout):
            message = waiting.pop(reply.metadata.src_node_id, None)
            if message is None:
                continue  # not asked, or answered twice
            failure = failure_of(reply) or self._fault(reply)
            self._on_reply(message, failure)
            yield reply if failure is None else failure_reply(message, failure)
        for message in waiting.values():
            self._on_reply(message, FailureCode.DEADLINE_EXCEEDED)
            yield failure_reply(message, FailureCode.DEADLINE_EXCEEDED)

    def _fault(self, reply: Message) -> FailureCode | None:
        try:
            metrics = metrics_of(reply.content)
            arrays = arrays_of(reply.content)
        except (KeyError, ValueError, TypeError, OSError, EOFError):
            return FailureCode.INVALID_REPLY
        weight = metrics.get(WEIGHT)
        if (
            len(reply.content) != 2
            or not isinstance(weight, int | float)
            or not 0 < weight < math.inf
            or (self._equal_weights and weight != 1)
            or {name: (values.shape, values.dtype) for name, values in arrays.items()} != self._shapes
        ):
            return FailureCode.INVALID_REPLY
        finite = all(map(_finite, metrics.values())) and all(np.isfinite(values).all() for values in arrays.values())
        return None if finite else FailureCode.NON_FINITE_UPDATE


def _finite(value: float | list[int] | list[float]) -> bool:
    return all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)
