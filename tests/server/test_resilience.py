"""One client cannot end everybody's run, whatever finite numbers it sends and whatever it calls itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from common.errors import RunError
from common.flower import CONFIG, TRAIN_LOSS, arrays_of
from server.coordinator import Coordinator, Job
from server.roster import discover
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.runs import STRATEGIES, configuration, prepared, private

NODES = range(2, 9)
HUGE = np.float32(3e38)


def honest_but_one(messages: list[Message]) -> Iterator[Message]:
    """Everybody moves by 0.1; in round 2 the first sends the largest numbers there are, which pass one by one."""
    for message in messages:
        arrays = {name: values + np.float32(0.1) for name, values in arrays_of(message.content).items()}
        second = message.content[CONFIG]["server-round"] == 2
        if message.metadata.dst_node_id == NODES[0] and second:
            arrays = {name: np.where(values > 0, HUGE, -HUGE) for name, values in arrays.items()}
        yield Message(update(arrays, **{TRAIN_LOSS: 0.5}), reply_to=message)


@pytest.mark.parametrize("name", STRATEGIES)
def test_values_that_overflow_cost_their_round_and_no_more(name: str, tmp_path: Path) -> None:
    """The step is undone, the next round's is made, and the model ends with finite numbers."""
    config = configuration(rounds=3, strategy={"name": name, **STRATEGIES[name]}, data={"clients": 7})
    grid = ScriptedGrid(honest_but_one, NODES)
    start = prepared(tmp_path, config).model
    before = {key: tensor.numpy().copy() for key, tensor in start.state_dict().items()}
    outcome = Coordinator(Job(config=config, model=start)).run(grid)
    assert outcome.rounds == 3
    for key, values in outcome.arrays.items():
        assert np.isfinite(values).all()
        assert not np.array_equal(values, before[key])


class Nameless(ScriptedGrid):
    """As under Flower's own runtime: nodes without names, to be asked."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.nodes]


def telling(names: dict[int, object]) -> Nameless:
    def answer(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            told = names[message.metadata.dst_node_id]
            yield Message(
                told
                if isinstance(told, RecordDict)
                else RecordDict(
                    {CONFIG: ConfigRecord({"client": told})}  # type: ignore[dict-item]
                ),
                reply_to=message,
            )

    return Nameless(answer, list(names))


class TestDiscovery:
    def test_an_answer_without_a_name_is_left_out(self) -> None:
        """No configuration, no name, a path for a name: the others go on without it."""
        grid = telling({2: "a", 3: RecordDict(), 4: RecordDict({CONFIG: ConfigRecord({})}), 5: "../../etc", 6: "b"})
        assert discover(grid, configuration()) == {"a": 2, "b": 6}

    def test_a_private_run_does_not_start_with_fewer_clients_than_its_noise_was_made_for(self, tmp_path: Path) -> None:
        """With fewer clients each would be asked more often than the plan counts."""
        config = private(rounds=8, cohort={"size": 1, "sampling": "balanced"})
        ready = prepared(tmp_path, config)
        grid = ScriptedGrid(honest_but_one, NODES[:2])
        with pytest.raises(RunError, match="only 2 clients"):
            Coordinator(Job(config=config, model=ready.model, plan=ready.plan)).run(grid)
        assert grid.sent == []
