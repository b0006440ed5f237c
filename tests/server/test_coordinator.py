"""A run is decided by its configuration alone: not by interruptions, node ids, or who answers first."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from common.config import RunConfig
from common.errors import FailureCode, RunError
from common.flower import ARRAYS, CONFIG, arrays_of, client_context, failure_reply, prepare_process
from server.app import make_server_app
from server.coordinator import Job, Outcome
from simulations.run import Prepared
from tests.helpers.coordinating import Relabelled, StoppedError, Stopping, coordinate, of, real_grid
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.runs import STRATEGIES, Log, as_bytes, configuration, prepared, private, rows, run

prepare_process()

every_strategy = pytest.mark.parametrize("name", STRATEGIES)


class TestEveryStrategy:
    @every_strategy
    def test_learns(self, name: str, tmp_path: Path) -> None:
        """Ten rounds of real training bring each strategy well above the 1/3 of guessing."""
        outcome, log = run(tmp_path / "run", of(name, rounds=10))
        assert outcome.evaluation is not None
        assert outcome.evaluation.accuracy > 0.6
        assert log.failures == [{}] * 10
        assert [values.dtype for values in outcome.arrays.values()] == [np.float32] * 2

    @every_strategy
    @pytest.mark.parametrize("place", ["started", "reply", "recorded"])
    def test_resumes_to_the_same_bytes(self, name: str, place: str, tmp_path: Path) -> None:
        """A run that stops anywhere in round 3 and is resumed ends with the bytes of one that never stopped."""
        config = of(name)
        expected, whole = run(tmp_path / "whole", config)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", config, observer=Stopping(place, 3))
        assert rows(tmp_path / "run") == ([1, 2, 3] if place == "recorded" else [1, 2])
        outcome, log = run(tmp_path / "run", config)
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert outcome.evaluation == expected.evaluation
        assert rows(tmp_path / "run") == [1, 2, 3, 4]
        assert [record.cohort for record in log.records] == [record.cohort for record in whole.records[2:]]

    @every_strategy
    def test_node_ids_and_order_of_arrival_change_no_bit(self, name: str, tmp_path: Path) -> None:
        """Random node ids, listed and answered in random orders, lead to the same bytes."""
        possible = prepared(tmp_path, of(name))
        results = [as_bytes(coordinate(possible, real_grid(possible)).arrays)]
        results += [
            as_bytes(coordinate(prepared(tmp_path, of(name)), Relabelled(possible, seed=i)).arrays) for i in (1, 2)
        ]
        assert results[1] == results[0]
        assert results[2] == results[0]

    @every_strategy
    def test_one_hostile_client_costs_only_its_own_update(self, name: str, tmp_path: Path) -> None:
        """A reply of the wrong form is that client's failure under every strategy, and the round counts the others."""
        config = configuration(rounds=2, data={"clients": 8}, strategy={"name": name, **STRATEGIES[name]})
        possible = prepared(tmp_path, config)
        inner = real_grid(possible)
        bad = [{"extra": 1.0}, {"train_loss": [0.5]}]

        def answer(messages: list[Message]) -> Iterable[Message]:
            for reply in inner.stream(messages):
                if reply.metadata.src_node_id == 4:
                    metrics = {"train_loss": 1.0, **bad[len(bad) % 2]}
                    bad.append({})
                    yield Message(update(arrays_of(reply.content), 5.0, **metrics), reply_to=messages[2])
                else:
                    yield reply

        grid = ScriptedGrid(answer, list(inner.get_node_ids()))
        grid.get_nodes = inner.get_nodes  # type: ignore[method-assign]
        log = Log()
        coordinate(possible, grid, observer=log)
        assert log.failures[0] == {"client-02": "invalid-reply"}
        assert all(len(record.survivors) >= 7 for record in log.records)


class TestCohort:
    @pytest.mark.parametrize("strategy", ["fedmedian", "fedavg"])
    def test_strategy_sees_nobody_beyond_the_cohort(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
    ) -> None:
        """A strategy that compares replies is shown the round's cohort, by ids and by nodes; one that needs only the
        mean is shown one of it, and what it says goes to all.
        """
        seen: list[tuple[list[int], list[str]]] = []
        original = FedAvg.configure_train

        def spy(self: FedAvg, server_round: int, arrays: Any, config: ConfigRecord, grid: Grid) -> Any:
            seen.append((list(grid.get_node_ids()), [node.name for node in grid.get_nodes()]))
            return original(self, server_round, arrays, config, grid)

        monkeypatch.setattr(FedAvg, "configure_train", spy)
        possible = prepared(tmp_path, rounds=5, data={"clients": 7}, cohort={"size": 3}, strategy={"name": strategy})
        grid, log = real_grid(possible), Log()
        names = {node.node_id: node.name for node in grid.get_nodes()}
        coordinate(possible, grid, observer=log)
        shown = [record.cohort[: 1 if strategy == "fedavg" else 3] for record in log.records]
        assert [sorted(names[node] for node in ids) for ids, _ in seen] == shown
        assert [sorted(nodes) for _, nodes in seen] == shown
        assert all(record.survivors == record.cohort and len(record.cohort) == 3 for record in log.records)

    def test_exactly_the_cohort_is_asked(self, tmp_path: Path) -> None:
        """Each member of a cohort gets one message a round; nobody else hears of the round."""
        possible = prepared(tmp_path, configuration(rounds=6, data={"clients": 7}, cohort={"size": 2}))
        grid, log = Relabelled(possible, seed=3), Log()
        coordinate(possible, grid, observer=log)
        asked = [grid.names[message.metadata.dst_node_id] for message in grid.sent]
        assert [sorted(asked[i : i + 2]) for i in range(0, 12, 2)] == [record.cohort for record in log.records]

    def test_cohorts_follow_from_their_seed(self, tmp_path: Path) -> None:
        """The same seed draws the same cohorts whatever the global generators do; another seed draws others."""
        cohorts = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            random.seed(noise)
            np.random.seed(noise)  # noqa: NPY002 - the global generator on purpose
            config = configuration(rounds=6, data={"clients": 7}, cohort={"size": 3}, seeds={"cohort": seed})
            log = Log()
            possible = prepared(tmp_path, config)
            coordinate(possible, real_grid(possible), observer=log)
            cohorts.append([record.cohort for record in log.records])
        assert cohorts[0] == cohorts[1]
        assert cohorts[0] != cohorts[2]

    def test_balanced_cohorts_stay_balanced_over_a_stop(self, tmp_path: Path) -> None:
        """Who took part how often is part of the checkpoint: after a stop the same clients are asked next."""
        config = configuration(rounds=7, data={"clients": 7}, cohort={"size": 3, "sampling": "balanced"})
        _, whole = run(tmp_path / "whole", config)
        with pytest.raises(StoppedError):
            run(tmp_path / "run", config, observer=Stopping("reply", 4))
        _, rest = run(tmp_path / "run", config)
        assert [record.cohort for record in rest.records] == [record.cohort for record in whole.records[3:]]

    def test_deadline_reaches_the_grid(self, tmp_path: Path) -> None:
        """The configured deadline is the timeout of every round's messages; 0 waits for ever."""
        for seconds, timeout in ((0.0, None), (2.5, 2.5)):
            possible = prepared(tmp_path, configuration(rounds=2, cohort={"deadline_seconds": seconds}))
            grid = Relabelled(possible, seed=1)
            coordinate(possible, grid)
            assert grid.timeouts == [timeout, timeout]


class TestTooFewReplies:
    def failing_after(self, possible: Prepared, good: int) -> ScriptedGrid:
        """A grid on which all clients fail from the third round on, but `good` of them."""
        inner = real_grid(possible)
        calls = iter(range(100))

        def answer(messages: list[Message]) -> Iterable[Message]:
            server_round = next(calls) + 1
            for i, message in enumerate(sorted(messages, key=lambda m: m.metadata.dst_node_id)):
                if server_round > 2 and i >= good:
                    yield failure_reply(message, FailureCode.CLIENT_FAILED)
                else:
                    yield from inner.stream([message])

        grid = ScriptedGrid(answer, list(inner.get_node_ids()))
        grid.get_nodes = inner.get_nodes  # type: ignore[method-assign]
        return grid

    @pytest.mark.parametrize(
        ("name", "good"), [("krum", 4), ("multikrum", 5), ("bulyan", 6), ("fedtrimmedavg", 4), ("fedavg", 0)]
    )
    def test_below_the_strategys_minimum_the_model_stays(self, name: str, good: int, tmp_path: Path) -> None:
        """With fewer replies than a strategy resists attacks with, a round changes nothing, and the run goes on."""
        config = configuration(rounds=2, data={"clients": 7}, strategy={"name": name, **STRATEGIES[name]})
        expected, _ = run(tmp_path / "two", config)
        longer = config.model_copy(update={"rounds": 4})
        possible, log = prepared(tmp_path, longer), Log()
        outcome = coordinate(possible, self.failing_after(possible, good), observer=log)
        assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
        assert [len(record.survivors) for record in log.records] == [7, 7, good, good]
        assert [record.train_loss is None for record in log.records] == [False, False, True, True]

    @pytest.mark.parametrize(("least", "changes"), [(4, False), (3, True)])
    def test_min_survivors_decides_what_is_a_round(self, least: int, changes: bool, tmp_path: Path) -> None:
        """With `cohort.min_survivors` updates a round counts, with one less the model stays as it is."""
        config = configuration(rounds=2)
        expected, _ = run(tmp_path / "two", config)
        longer = configuration(rounds=3, cohort={"min_survivors": least})
        possible = prepared(tmp_path, longer)
        outcome = coordinate(possible, self.failing_after(possible, 3))
        assert (as_bytes(outcome.arrays) != as_bytes(expected.arrays)) is changes

    @pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian"])
    def test_nobody_ever_answers(self, name: str, tmp_path: Path) -> None:
        """A run without a single update ends in an error, not in an untrained model."""
        possible = prepared(tmp_path, strategy={"name": name})
        grid = ScriptedGrid(lambda messages: [], [2, 3, 4, 5])
        log = Log()
        with pytest.raises(RunError, match="no client sent an update") as raised:
            coordinate(possible, grid, observer=log)
        assert "rounds.jsonl" in raised.value.hint
        assert log.failures == [{f"node-{i}": "deadline-exceeded" for i in (2, 3, 4, 5)}] * 3

    def test_error_also_after_a_stop(self, tmp_path: Path) -> None:
        """Resuming a run in which nobody answered does not make its model a result."""
        trouble = {"data": {"name": "one-in-trouble", "sites": ["client-01"]}, "model": {"options": {"trouble": "nan"}}}
        for _ in range(2):
            with pytest.raises(RunError, match="no client sent an update"):
                run(tmp_path / "run", **trouble)
        assert rows(tmp_path / "run") == [1, 2, 3]


class TestWhatTravels:
    def test_clients_are_sent_the_run_and_the_model(self, tmp_path: Path) -> None:
        """A training message holds the configuration, the round and the arrays; without privacy nothing else."""
        possible = prepared(tmp_path, rounds=1)
        grid = Relabelled(possible, seed=1)
        coordinate(possible, grid)
        for message in grid.sent:
            assert sorted(message.content) == [ARRAYS, CONFIG]
            config = message.content.config_records[CONFIG]
            assert sorted(config) == ["run", "server-round"]
            assert RunConfig.model_validate_json(str(config["run"])) == possible.config

    def test_private_run_sends_its_noise_and_takes_no_losses(self, tmp_path: Path) -> None:
        """With privacy, clients get noise multiplier and participations; a reply with a loss beside it is refused."""
        possible = prepared(tmp_path, private(rounds=2))
        assert possible.plan is not None
        inner, log = Relabelled(possible, seed=1), Log()
        coordinate(possible, inner, observer=log)
        sent = inner.sent[0].content.config_records[CONFIG]
        assert (sent["noise-multiplier"], sent["participations"]) == (possible.plan.noise_multiplier, 2)
        assert [(record.failures, record.train_loss) for record in log.records] == [({}, None)] * 2

        def leak(messages: list[Message]) -> Iterable[Message]:
            return [
                Message(update(arrays_of(message.content), 1.0, train_loss=0.5), reply_to=message)
                for message in messages
            ]

        with pytest.raises(RunError, match="no client sent an update"):
            coordinate(prepared(tmp_path, private(rounds=1)), ScriptedGrid(leak, [2, 3]))

    @pytest.mark.parametrize("weight", [12.0, 1.5])
    def test_private_run_takes_equal_weights_only(self, weight: float, tmp_path: Path) -> None:
        """With privacy a client counts as one, whatever it claims: its number of examples is private."""

        def claim(messages: list[Message]) -> Iterable[Message]:
            return [Message(update(arrays_of(m.content), weight), reply_to=m) for m in messages]

        log = Log()
        with pytest.raises(RunError):
            coordinate(prepared(tmp_path, private(rounds=1)), ScriptedGrid(claim, [2]), observer=log)
        assert log.failures == [{"node-2": "invalid-reply"}]


class TestPrivateRunThatStopped:
    @staticmethod
    def _stopped(path: Path) -> RunConfig:
        config = private(rounds=4, data={"clients": 2})
        with pytest.raises(StoppedError):
            run(path, config, observer=Stopping("recorded", 2))
        return config

    @staticmethod
    def _rounds(path: Path, config: RunConfig) -> list[list[int]]:
        ledgers = prepared(path, config).sites.ledgers
        assert ledgers is not None
        return [[e.server_round for e in ledgers.of(name).events()] for name in ("client-00", "client-01")]

    def test_resends_what_was_paid_for(self, tmp_path: Path) -> None:
        """A round begun before a stop is in the ledger, and its update was stored: made again, it costs nothing."""
        config = self._stopped(tmp_path / "run")
        outcome, log = run(tmp_path / "run", config)
        assert self._rounds(tmp_path / "run", config) == [[1, 2, 3, 4]] * 2
        assert log.failures == [{}, {}, {}]
        assert outcome.rounds == 4

    def test_never_spends_more_than_its_target(self, tmp_path: Path) -> None:
        """Where stored updates are lost the round costs again, and the last one is refused rather than the target
        passed.
        """
        config = self._stopped(tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "spool")
        outcome, log = run(tmp_path / "run", config)
        assert self._rounds(tmp_path / "run", config) == [[1, 2, 2, 3]] * 2
        assert all(4.0 < spent <= 5.0 for spent in prepared(tmp_path / "run", config).spent().values())
        assert log.failures == [{}, {}, {"client-00": "budget-exhausted", "client-01": "budget-exhausted"}]
        assert outcome.rounds == 4


class TestServerApp:
    def test_outcome_is_handed_over(self, tmp_path: Path) -> None:
        """The ServerApp coordinates its job over whatever grid an engine gives it."""
        possible = prepared(tmp_path)
        outcomes: list[Outcome] = []
        app = make_server_app(Job(config=possible.config, model=possible.model), outcomes.append)
        app(real_grid(possible), client_context(node_id=0, partition=0))
        (outcome,) = outcomes
        assert outcome.rounds == 3
        assert outcome.evaluation is None
