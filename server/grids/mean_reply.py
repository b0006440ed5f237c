"""One reply that stands for many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.flower import ARRAYS, CONFIG, METRICS, WEIGHT, stamp, to_record

Arrays = Mapping[str, NDArray[Any]]


def mean_reply(model: Arrays, names: Sequence[str], mean: NDArray[np.float64], *, to: Message | None) -> Message:
    """The model plus a mean update, in the model's dtypes, with weight 1.

    Args:
        model: What the round began with.
        names: The floating-point arrays that `mean` covers, in its order; all others are the model's own.
        mean: float64[d].
        to: Any message of the round; None where there was none.
    """
    arrays = dict(model)
    with np.errstate(over="ignore"):  # an infinity is refused with the aggregate
        for name, part in parts(model, names, mean):
            values = model[name]
            arrays[name] = (values + part.reshape(values.shape)).astype(values.dtype)
    return one_reply(arrays, to=to)


def one_reply(
    arrays: Arrays, *, to: Message | None, weight: float = 1.0, metrics: Mapping[str, float] | None = None
) -> Message:
    """Weights as if one client had sent them, in answer to a message of the round, or to none."""
    told = MetricRecord({WEIGHT: weight, **(metrics or {})})
    return Message(RecordDict({ARRAYS: to_record(arrays), METRICS: told}), reply_to=to or _nobody())


def parts(model: Arrays, names: Sequence[str], flat: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """A flat vector's part for each of these arrays, as views."""
    start = 0
    for name in names:
        yield name, flat[start : start + model[name].size]
        start += model[name].size


def no_single_replies(why: str) -> PrivacyError:
    """For grids through which single replies must not be pulled."""
    return PrivacyError(f"single replies are not shown {why}", hint="use send_and_receive")


def _nobody() -> Message:
    """A message that was never sent, for a round in which nobody was asked."""
    return stamp(Message(RecordDict({CONFIG: ConfigRecord()}), 0, MessageType.TRAIN), message_id="nobody")
