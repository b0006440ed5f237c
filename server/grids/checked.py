"""Lets only sound replies pass: what a client sends is not trusted to fit the model, or to be finite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import FailureCode
from common.flower import WEIGHT, arrays_of, failure_of, failure_reply, metrics_of
from server.grids.base import WrappingGrid, stream_replies

MOST_WEIGHT: Final = 2.0**53
"""Largest weight of one reply: as far as counts are exact in float64, and no sum of them overflows."""


LARGEST_INTEGER: Final = 2.0**53
"""Largest magnitude of an integer: means are formed in float64."""


class Soundness:
    """What a reply has to be, so that it counts as an update of a model.

    Guarantee: a reply without a fault has exactly the template's arrays (names in their order, shapes, dtypes), all
    values finite and no larger than `largest`, or than twice the largest of the template's array;
    one weight in (0, `MOST_WEIGHT`], with `equal_weights` 1; and exactly the other metrics that `metrics`
    names, each one finite number. Flower's strategies fail as a whole where one reply has other metrics.
    """

    def __init__(
        self, template: Mapping[str, NDArray[Any]], *, equal_weights: bool, metrics: Iterable[str], largest: float
    ) -> None:
        self._shapes = _shapes(template)
        self._limits = {name: _limit(values, largest) for name, values in template.items()}
        self._equal_weights = equal_weights
        self._metrics = {WEIGHT, *metrics}

    def fault(self, reply: Message) -> FailureCode | None:
        """Why a reply does not count; None if it does."""
        return failure_of(reply) or self._fault(reply)

    def _fault(self, reply: Message) -> FailureCode | None:
        try:
            metrics = metrics_of(reply.content)
            arrays = arrays_of(reply.content)
            shapes = _shapes(arrays)
        except Exception:  # noqa: BLE001 - the boundary: a peer's bytes can fail to decode in any way
            return FailureCode.INVALID_REPLY
        if (
            len(reply.content) != 2
            or shapes != self._shapes
            or metrics.keys() != self._metrics
            or not all(isinstance(value, int | float) for value in metrics.values())
        ):
            return FailureCode.INVALID_REPLY
        weight, others = metrics[WEIGHT], [value for name, value in metrics.items() if name != WEIGHT]
        if not 0 < weight <= MOST_WEIGHT or (self._equal_weights and weight != 1):  # type: ignore[operator]
            return FailureCode.INVALID_REPLY
        if not all(map(_finite, others)) or not all(
            _magnitude(values) <= self._limits[name] for name, values in arrays.items()
        ):
            return FailureCode.NON_FINITE_UPDATE
        return FailureCode.INVALID_REPLY if any(value < 0 for value in others) else None  # type: ignore[operator]


class CheckedGrid(WrappingGrid):
    """Turns a reply that does not fit into a typed failure, and tells `on_reply` of each reply's fate.

    Guarantee: a reply that passes is sound; see `Soundness`.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        template: Mapping[str, NDArray[Any]],
        equal_weights: bool,
        metrics: Iterable[str],
        largest: float,
        on_reply: Callable[[Message, FailureCode | None], None],
    ) -> None:
        super().__init__(inner)
        self._sound = Soundness(template, equal_weights=equal_weights, metrics=metrics, largest=largest)
        self._on_reply = on_reply

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, unsound ones as failures; a client that never answers is a failure too."""
        waiting = {message.metadata.dst_node_id: message for message in messages}
        for reply in stream_replies(self._inner, list(waiting.values()), timeout):
            message = waiting.pop(reply.metadata.src_node_id, None)
            if message is None:
                continue  # not asked, or answered twice
            failure = self._sound.fault(reply)
            self._on_reply(message, failure)
            yield reply if failure is None else failure_reply(message, failure)
            del reply  # or it stays in memory while the next one arrives
        for message in waiting.values():
            self._on_reply(message, FailureCode.DEADLINE_EXCEEDED)
            yield failure_reply(message, FailureCode.DEADLINE_EXCEEDED)


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    """Names in their order, which strategies pair arrays by, with shapes and dtypes."""
    return [(name, values.shape, values.dtype) for name, values in arrays.items()]


def _limit(template: NDArray[Any], largest: float) -> float:
    """How large a reply's values may be."""
    least = largest if template.dtype.kind == "f" else LARGEST_INTEGER
    return max(least, 2 * _magnitude(template))


def _magnitude(values: NDArray[Any]) -> float:
    """Largest absolute value; 0 of nothing, NaN if any is NaN."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def _finite(value: float | list[int] | list[float]) -> bool:
    return not isinstance(value, list) and abs(value) <= sys.float_info.max  # an integer can lie beyond any float
