"""Replies whose update was shortened reach the strategy as weights, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from common.errors import FailureCode
from common.flower import ARRAYS, METRICS, arrays_of, failure_of, failure_reply, metrics_of
from common.transport.compression import Compression, encode_update, update_of
from server.grids.decompressed import DecompressingGrid
from tests.helpers.grids import ScriptedGrid, train_messages, update

MODEL = {"w": np.linspace(-1, 1, 40, dtype=np.float32), "n": np.array(1)}
TRAINED = {"w": MODEL["w"] + np.float32(0.5), "n": np.array(2)}
MESSAGES = train_messages(MODEL, [2, 3])
HOW = Compression(codec="bf16")
ENCODED = encode_update(update_of(MODEL, TRAINED), TRAINED, HOW, seed=b"")


def answered(*contents: RecordDict) -> list[Message]:
    replies = [Message(content, reply_to=message) for content, message in zip(contents, MESSAGES, strict=False)]
    return list(DecompressingGrid(ScriptedGrid(lambda _: replies), template=MODEL, how=HOW).stream(MESSAGES))


def test_weights_are_restored_and_everything_else_is_left() -> None:
    """The strategy sees the trained model with its metrics, as if it had travelled whole."""
    (reply,) = answered(update(ENCODED, 3.0, train_loss=0.25))
    found = arrays_of(reply.content)
    np.testing.assert_array_equal(found["w"], TRAINED["w"])
    assert (found["n"], list(found)) == (2, ["w", "n"])
    assert dict(metrics_of(reply.content)) == {"num-examples": 3.0, "train_loss": 0.25}
    assert reply.metadata.src_node_id == 2


@pytest.mark.parametrize(
    "content",
    [
        update(TRAINED),
        update({**ENCODED, "w": ENCODED["w"][:-1]}),
        update({**ENCODED, "w": np.zeros(10_000, np.uint8)}),
        update({"w": ENCODED["w"]}),
        update({}),
        RecordDict({METRICS: update(ENCODED)[METRICS]}),
        RecordDict({ARRAYS: update(ENCODED)[METRICS]}),
    ],
    ids=["not encoded", "short", "long", "one missing", "none", "no arrays", "metrics in place of arrays"],
)
def test_what_does_not_fit_exactly_is_an_invalid_reply(content: RecordDict) -> None:
    """A reply that is not this model's update fails alone; the next one counts."""
    first, second = answered(content, update(ENCODED))
    assert failure_of(first) is FailureCode.INVALID_REPLY
    assert first.metadata.src_node_id == 2
    assert failure_of(second) is None


def test_failures_pass() -> None:
    """What holds no update is handed on."""
    failed = failure_reply(MESSAGES[0], FailureCode.CLIENT_LOST)
    grid = DecompressingGrid(ScriptedGrid(lambda _: [failed]), template=MODEL, how=HOW)
    assert list(grid.stream(MESSAGES)) == [failed]
