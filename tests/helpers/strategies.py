"""Strategies over clients that only pretend to train: a round of ten takes a millisecond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from common.config import StrategySettings
from common.flower import stamp
from server.strategies import cast_like, make_strategy
from tests.helpers.runs import STRATEGIES

OPTIONS: dict[str, dict[str, Any]] = {**STRATEGIES, "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.5}}
every_strategy = pytest.mark.parametrize("name", OPTIONS)


class CohortGrid:
    """What a strategy may ask of a grid: who is there."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> Sequence[int]:
        return self.nodes


def settings(name: str, **options: Any) -> StrategySettings:
    return StrategySettings(name=name, **{**OPTIONS[name], **options})  # type: ignore[arg-type]


def make(name: str, **options: Any) -> FedAvg:
    return make_strategy(settings(name, **options), client_learning_rate=0.1)


def record(arrays: dict[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({key: Array(values) for key, values in arrays.items()})


def model() -> ArrayRecord:
    """Keys out of alphabetical order, and one array without dimensions."""
    zeros, ones = np.zeros((5, 3), np.float32), np.ones(3, np.float32)
    return record({"weight": zeros, "bias": ones, "a.scale": np.array(2, np.float32)})


def messages_of(strategy: Strategy, server_round: int, arrays: ArrayRecord, nodes: Sequence[int]) -> list[Message]:
    grid = cast(Grid, CohortGrid(nodes))
    messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def answer(message: Message, arrays: ArrayRecord, *, examples: int = 1, loss: float = 1.0) -> Message:
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=stamp(message, message_id="m"))


def trained(message: Message, server_round: int) -> Message:
    """A client that moves every weight a little, in a way that depends on round and node only."""
    node = message.metadata.dst_node_id
    generator = np.random.default_rng([node, server_round])
    arrays = cast(ArrayRecord, message.content["arrays"])
    moved = {k: a.numpy() + 0.01 * generator.standard_normal(a.shape) for k, a in arrays.items()}
    return answer(message, record({k: np.asarray(v, np.float32) for k, v in moved.items()}), examples=node, loss=node)


def one_round(strategy: Strategy, server_round: int, arrays: ArrayRecord, clients: int = 10) -> ArrayRecord:
    messages = messages_of(strategy, server_round, arrays, range(2, 2 + clients))
    result, _ = strategy.aggregate_train(server_round, [trained(message, server_round) for message in messages])
    assert result is not None
    return cast_like(result, arrays)


def aggregate(name: str, values: Sequence[float], **options: Any) -> float | None:
    """What a strategy makes of clients that each send one number."""
    strategy, start = make(name, **options), record({"w": np.zeros(1, np.float32)})
    messages = messages_of(strategy, 1, start, range(2, 2 + len(values)))
    replies = [answer(m, record({"w": np.array([v], np.float32)})) for m, v in zip(messages, values, strict=True)]
    result, _ = strategy.aggregate_train(1, replies)
    return None if result is None else float(result["w"].numpy()[0])


def plain(value: Any) -> Any:
    """A value in a form that compares by bytes, dtype, shape, order and type."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value).__name__, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, ArrayRecord | dict):
        return type(value).__name__, [(key, plain(part)) for key, part in value.items()]
    if isinstance(value, Array):
        return plain(value.numpy())
    return (type(value).__name__, [plain(part) for part in value]) if isinstance(value, list) else value
