"""What the coordinator does with a round's replies: let the strategy step, without copies that change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from numpy.typing import NDArray

from common.flower import ARRAYS, WEIGHT, arrays_of, metrics_of, to_record
from server.strategies import replies_needed


def aggregate(
    strategy: Strategy, server_round: int, replies: Sequence[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """What `strategy.aggregate_train` returns, to the bit (`cast_like` given, where the model holds integers).

    FedAvg and FedProx make a weighted mean of the replies. Of one reply that is the reply: its weight over the sum of
    all is exactly 1, and x * 1.0 is x. Flower multiplies all the same and encodes each product anew: two models more in
    memory, for nothing.
    """
    sound = [reply.content for reply in replies if reply.has_content()]
    if (
        len(sound) != 1
        or not isinstance(strategy, FedAvg)
        or type(strategy) not in (FedAvg, FedProx)
        or replies_needed(strategy) != "mean"
        or strategy.weighted_by_key != WEIGHT
    ):
        return strategy.aggregate_train(server_round, replies)
    record, metrics = sound[0][ARRAYS], metrics_of(sound[0])
    if not isinstance(record, ArrayRecord) or any(isinstance(value, list) for value in metrics.values()):
        return strategy.aggregate_train(server_round, replies)
    aggregated = MetricRecord()
    for name, value in metrics.items():
        if name != WEIGHT and not isinstance(value, list):
            aggregated[name] = value * 1.0
    return record, aggregated


def make_writable(reply: Message) -> None:
    """Let a strategy own a reply's arrays: QFedAvg computes in place, and a worker's reply is a read-only view."""
    if reply.has_content():
        arrays = arrays_of(reply.content)
        if not all(values.flags.writeable for values in arrays.values()):
            reply.content[ARRAYS] = to_record({name: values.copy() for name, values in arrays.items()})


def all_finite(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether every value of every floating-point array is finite."""
    return all(map(_finite, arrays.values()))


def _finite(values: NDArray[Any]) -> bool:
    """Looks at the extremes, which are NaN where any value is: a mask would take a quarter of the array's memory."""
    if values.dtype.kind != "f" or not values.size:
        return True
    return math.isfinite(values.max()) and math.isfinite(values.min())
