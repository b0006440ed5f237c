"""Steps of secure aggregation inside Flower's messages: how they are sent, and what is believed of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import FailureCode
from common.flower import (
    ARRAYS,
    CONFIG,
    MASKED,
    ROUND_STEP,
    SECAGG,
    SECAGG_TYPE,
    SETUP_STEP,
    arrays_of,
    failure_of,
    from_record,
    to_record,
)
from server.grids.base import stream_replies

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one client is sent: a step of the round, one of the next set-up, or both."""

    round: bytes | None = None
    setup: bytes | None = None

    def record(self) -> ArrayRecord:
        """As it travels."""
        steps = {ROUND_STEP: self.round, SETUP_STEP: self.setup}
        return to_record({key: np.frombuffer(data, np.uint8) for key, data in steps.items() if data is not None})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heard:
    """What came of one client: why there is nothing, or what there is of its steps and its masked update.

    Attributes:
        name: The client.
        failure: None if it answered in the right form. Then `round`, `setup` and `masked` may be there.
        masked: uint8[n], not to be written to.
    """

    name: str
    failure: FailureCode | None = None
    round: bytes | None = None
    setup: bytes | None = None
    masked: Bytes | None = None


def steps_alone(steps: Mapping[str, Step], *, nodes: Mapping[str, int], record: ConfigRecord) -> list[Message]:
    """Messages that carry nothing else; clients that are sent the same share one content, which is sealed once."""
    contents: dict[Step, RecordDict] = {}
    for step in steps.values():
        if step not in contents:
            contents[step] = RecordDict({CONFIG: record, SECAGG: step.record()})
    return [Message(contents[step], nodes[name], SECAGG_TYPE) for name, step in steps.items() if name in nodes]


def with_steps(messages: Mapping[str, Message], steps: Mapping[str, Step]) -> list[Message]:
    """Training messages with a step beside what they carry; those of the same step share one content."""
    contents: dict[tuple[int, Step], RecordDict] = {}
    sent = []
    for name, message in messages.items():
        key = (id(message.content), steps[name])
        if key not in contents:
            contents[key] = RecordDict({**message.content, SECAGG: steps[name].record()})
        meta = message.metadata
        sent.append(Message(contents[key], meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id))
    return sent


def hear(
    grid: Grid, messages: Iterable[Message], *, names: Mapping[int, str], timeout: float | None
) -> Iterator[Heard]:
    """Send messages, and tell of every client once, as its answer arrives; who never answers missed the deadline.

    Guarantee: whatever bytes a client sends, it is heard of in one of these forms.
    """
    messages = list(messages)
    waiting = {message.metadata.dst_node_id for message in messages}
    for reply in stream_replies(grid, messages, timeout) if messages else ():
        node = reply.metadata.src_node_id
        if node not in waiting:
            continue  # not asked, or answered twice
        waiting.remove(node)
        yield _heard(names[node], reply)
        del reply  # or it stays in memory while the next one arrives
    for node in sorted(waiting):
        yield Heard(name=names[node], failure=FailureCode.DEADLINE_EXCEEDED)


def _heard(name: str, reply: Message) -> Heard:
    failure = failure_of(reply)
    if failure is not None:
        return Heard(name=name, failure=failure)
    try:
        steps = _steps(reply.content)
        return Heard(name=name, masked=_masked(reply.content), **steps)
    except Exception:  # noqa: BLE001 - the boundary: a peer's bytes can fail to decode in any way
        return Heard(name=name, failure=FailureCode.INVALID_REPLY)


def _steps(content: RecordDict) -> dict[str, Any]:
    """The steps in an answer, which holds nothing but them and a masked update."""
    if not content.keys() <= {SECAGG, ARRAYS}:
        raise ValueError(CONFIG)
    record = content.get(SECAGG, ArrayRecord())
    if not isinstance(record, ArrayRecord) or not record.keys() <= {ROUND_STEP, SETUP_STEP}:
        raise TypeError(SECAGG)
    found = {key: _bytes(values).tobytes() for key, values in from_record(record).items()}
    return {"round": found.get(ROUND_STEP), "setup": found.get(SETUP_STEP)}


def _masked(content: RecordDict) -> Bytes | None:
    if ARRAYS not in content:
        return None
    arrays = arrays_of(content)
    if arrays.keys() != {MASKED}:
        raise KeyError(MASKED)
    return _bytes(arrays[MASKED])


def _bytes(values: NDArray[Any]) -> Bytes:
    if values.dtype != np.uint8 or values.ndim != 1:
        raise TypeError(values.dtype)
    return values
