"""One client cannot end everybody's run, whatever finite numbers it sends and whatever it calls itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.errors import RunError
from common.flower import CONFIG, TRAIN_LOSS, NodeInfo, arrays_of
from server.asking import plain
from server.coordinator import Coordinator, Job
from server.roster import discover
from server.strategies import largest_value
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.runs import STRATEGIES, Log, configuration, prepared, private

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
@pytest.mark.parametrize("size", [1e3, 1e9, 1e12, 1e18, 1e23, 3e38])
def test_one_client_cannot_undo_every_round(name: str, size: float, tmp_path: Path) -> None:
    """However large the numbers that it sends in every round, rounds have an aggregate, and what it sent beyond all
    measure is on record as its own failure.
    """

    def answer(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            hostile = message.metadata.dst_node_id == 2
            arrays = {
                name: np.full_like(values, -size) if hostile else values + np.float32(0.1)
                for name, values in arrays_of(message.content).items()
            }
            yield Message(update(arrays, **{TRAIN_LOSS: 0.5}), reply_to=message)

    config = configuration(rounds=3, strategy={"name": name, **STRATEGIES[name]}, data={"clients": 8})
    log = Log()
    Coordinator(Job(config=config, model=prepared(tmp_path, config).model, observer=log)).run(
        ScriptedGrid(answer, range(2, 10))
    )
    assert [record.aggregate_refused for record in log.records] == [False] * 3
    assert log.failures == (
        [{"node-2": "non-finite-update"}] * 3 if size > largest_value(config.strategy) else [{}] * 3
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_values_that_overflow_cost_their_round_and_no_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a strategy overflow all the same, the step is undone, the next round's is made, and the model ends with
    finite numbers.
    """
    monkeypatch.setattr(plain, "largest_value", lambda _: np.inf)
    config = configuration(rounds=3, strategy={"name": name, **STRATEGIES[name]}, data={"clients": 7})
    grid = ScriptedGrid(honest_but_one, NODES)
    start = prepared(tmp_path, config).model
    before = {key: tensor.numpy().copy() for key, tensor in start.state_dict().items()}
    log = Log()
    outcome = Coordinator(Job(config=config, model=start, observer=log)).run(grid)
    assert outcome.rounds == 3
    refused = [record.aggregate_refused for record in log.records]
    assert refused in ([False, True, False], [False] * 3)
    assert refused[1] or name not in {"fedadam", "fedyogi"}, "these keep squares in float32"
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
    def test_who_answers_twice_is_heard_once(self) -> None:
        """A second name, or the same again, neither adds a client nor stops the start."""
        inner = telling({2: "a", 3: "b"})
        more = telling({2: "a", 3: "c"})
        grid = ScriptedGrid(lambda messages: [*inner.stream(messages), *more.stream(messages)], [2, 3])
        grid.get_nodes = inner.get_nodes  # type: ignore[method-assign]
        assert discover(grid, configuration()) == {"a": 2, "b": 3}

    def test_clients_are_waited_for_no_longer_than_in_a_round(self) -> None:
        """The run's deadline holds for the question, too."""
        grid = telling({2: "a"})
        discover(grid, configuration(cohort={"deadline_seconds": 7.0}))
        assert grid.timeouts == [7.0]

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
