"""All that Coterie takes from Flower beyond its public API, in one place; flwr is pinned because of it.

Used names that are not public: `TaskIdentity` (a `Message` cannot be built outside a Flower task without it), the
fields behind `Message.metadata` (a transport has to set the message's id and run), `NodeInfo` and `Run` (in the
signatures of `Grid`), and Flower's logger (it logs each step of a strategy). `tests/common/test_flower.py` and the
grids' contract suite test them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo as NodeInfo  # noqa: PLC0414 - passed on
from flwr.supercore.run import Run as Run  # noqa: PLC0414 - passed on
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from common.errors import FailureCode

RUN_ID = 1
SERVER_NODE_ID = 1
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Keys of the records in every message; the first two are Flower's own defaults."""
WEIGHT = "num-examples"
"""Metric by which Flower's strategies weigh a reply."""
TRAIN_LOSS = "train_loss"
"""Metric of a reply without privacy; Flower's QFedAvg asks for it under this name."""
RUN, ROUND = "run", "server-round"
"""Keys of every request's configuration; Flower's strategies set the round."""
NOISE, ORDER = "noise-multiplier", "renyi-order"
PARTICIPATIONS, SEPARATION, CLIENTS = "participations", "min-separation", "clients"
CLIPPING_NORM = "clipping-norm"
"""Keys of a private request: what the plan was calibrated to; the client counts it again by itself."""
WITHIN = "within"
"""Metric of a reply under adaptive clipping by client: whether the update lay within the clipping norm."""
CLIENT, SCHEMA = "client", "schema"
"""Keys of a client's answer to a query: its public name, and the public facts of its data as JSON."""
RUN_HEX, AUTHORIZATION, COHORT = "run-id", "authorization", "cohort"
"""Keys of every request of a run that an operator submitted: the run's id in hexadecimal, what the operator signed, and
the cohort's names as a JSON list. Under client-level privacy there is no cohort: who takes part is not told."""
SECAGG = "secagg"
"""Key of the record with messages of secure aggregation: uint8 arrays `ROUND_STEP` and `SETUP_STEP`, either or both."""
ROUND_STEP, SETUP_STEP = "round", "setup"
MASKED = "masked"
"""The one array of an update under secure aggregation: uint8[n], a packed masked vector."""
SECAGG_TYPE = "query.secagg"
"""Type of the messages that carry nothing but steps of secure aggregation."""


def prepare_process() -> None:
    """Let this process build Flower messages outside a Flower task, and keep Flower's own log to warnings.

    Does nothing to an identity that Flower itself has set.
    """
    if TaskIdentity.__dict__["_run_id"] is None:  # the property raises while it is unset
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 1
    logging.getLogger("flwr").setLevel(logging.ERROR)


class NumpyArray(Array):
    """A Flower `Array` that holds a numpy array and encodes it only when its bytes are asked for.

    Flower's own encodes when it is made and decodes at every `numpy()`: five times the cost of a small model's
    training.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        fields = self.__dict__
        fields["dtype"], fields["shape"], fields["stype"] = _dtype_name(values.dtype), values.shape, "numpy.ndarray"
        fields["_values"] = values

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in npy format, encoded now."""
        buffer = BytesIO()
        np.save(buffer, self.__dict__["_values"], allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> NDArray[Any]:
        """The array itself, not a copy: do not write to it."""
        values: NDArray[Any] = self.__dict__["_values"]
        return values

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Travels between Flower's own processes as a plain `Array`."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


# Copying an empty record is several times cheaper than making one, which sorts out its arguments first.
_NO_ARRAYS, _NO_METRICS, _NO_RECORDS = ArrayRecord(), MetricRecord(), RecordDict()


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """An `ArrayRecord` over these arrays, without copying or encoding them."""
    record = _NO_ARRAYS.copy()  # made from a dict, every array would be encoded
    for name, values in arrays.items():
        record[name] = NumpyArray(values)
    return record


def from_record(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays of a record by name; not to be written to."""
    return {name: array.numpy() for name, array in record.items()}


def arrays_of(content: RecordDict) -> dict[str, NDArray[Any]]:
    """A message's arrays by name; not to be written to.

    Raises:
        KeyError: There are none. (`RecordDict.array_records` would build a view of everything at each call.)
    """
    record = content[ARRAYS]
    if not isinstance(record, ArrayRecord):
        raise KeyError(ARRAYS)
    return from_record(record)


def metrics_of(content: RecordDict) -> MetricRecord:
    """A message's metrics.

    Raises:
        KeyError: There are none.
    """
    record = content[METRICS]
    if not isinstance(record, MetricRecord):
        raise KeyError(METRICS)
    return record


def config_of(content: RecordDict) -> ConfigRecord:
    """A message's configuration.

    Raises:
        KeyError: There is none.
    """
    record = content[CONFIG]
    if not isinstance(record, ConfigRecord):
        raise KeyError(CONFIG)
    return record


def stamp(message: Message, *, message_id: str) -> Message:
    """Give a message what Flower's transport would: an id and the run's identity. Returns the same message."""
    message.metadata.__dict__.update(_message_id=message_id, _run_id=RUN_ID, _src_node_id=SERVER_NODE_ID)
    return message


def answering(reply: Message, message_id: str) -> Message:
    """Let a reply say that it answers the message of this id. Returns the same reply."""
    reply.metadata.__dict__["_reply_to_message_id"] = message_id
    return reply


def update_reply(message: Message, arrays: Mapping[str, NDArray[Any]], metrics: Mapping[str, float]) -> Message:
    """A reply with new weights and the metrics that go with them, `WEIGHT` among them."""
    content, record = _NO_RECORDS.copy(), _NO_METRICS.copy()
    for name, value in metrics.items():
        record[name] = value
    content[ARRAYS], content[METRICS] = to_record(arrays), record
    return Message(content, reply_to=message)


def failure_reply(message: Message, failure: FailureCode) -> Message:
    """A reply that says why there is no update, and nothing else."""
    return Message(Error(code=int(failure), reason=failure.sentence), reply_to=message)


def failure_of(reply: Message) -> FailureCode | None:
    """Why a reply has no update; None if it has one. Flower's own error codes read as a failed client."""
    if not reply.has_error():
        return None
    try:
        return FailureCode(reply.error.code)
    except ValueError:
        return FailureCode.CLIENT_FAILED


def client_context(*, node_id: int, partition: int, state: RecordDict | None = None) -> Context:
    """A Flower `Context` for one simulated client."""
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config={"partition-id": partition},
        state=_NO_RECORDS.copy() if state is None else state,
        run_config={},
    )
