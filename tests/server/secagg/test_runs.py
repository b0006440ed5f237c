"""Runs under secure aggregation: epochs over rounds, rounds that are given up, groups, and every strategy on top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.config import RunConfig
from common.errors import ConfigError, FailureCode, RunError
from common.flower import ROUND, ROUND_STEP, SECAGG, arrays_of, config_of, failure_reply, from_record
from common.secagg import SecAggError
from common.secagg.messages import Train
from server.asking import summed
from server.coordinator import Coordinator, Job
from server.job import RoundRecord
from server.planning import check_clients
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.masked import FIRST, FORGET, VANISH, Fault, Members, coordinate, masked
from tests.helpers.releasing import TRAINABLE, Net, plan_of, start
from tests.helpers.runs import STRATEGIES, Log

ABSENT = FailureCode.NOT_IN_EPOCH.slug
ABORTED = FailureCode.AGGREGATION_ABORTED.slug


def ran(config: RunConfig, clients: int = 5, **options: Any) -> tuple[list[RoundRecord], Members]:
    grid, log = Members(config, clients, **options), Log()
    coordinate(config, grid, observer=log)
    return log.records, grid


def epochs(records: list[RoundRecord]) -> list[tuple[int, int]]:
    """Epoch and index of every round."""
    return [(r.aggregation.epoch, r.aggregation.index) for r in records if r.aggregation]


def kinds(grid: Members, name: str) -> list[str]:
    return [kind for kind, _, client in grid.kinds if client == name]


def clear(config: RunConfig, clients: int) -> dict[str, Any]:
    """The same run without masks: the same strategy over the same updates, in clear."""

    def answer(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            name, server_round = f"site-{message.metadata.dst_node_id - FIRST:02d}", asked(message)
            change = members.change(name, server_round)
            trained = {key: v + np.asarray(change, v.dtype) for key, v in arrays_of(message.content).items()}
            yield Message(update(trained, 1.0, train_loss=0.5), reply_to=message)

    members = Members(config, clients)
    privacy = config.privacy.model_copy(update={"secure_aggregation": False})
    plain = config.model_copy(update={"privacy": privacy})
    grid = ScriptedGrid(answer, range(FIRST, FIRST + clients))
    return dict(Coordinator(Job(config=plain, model=Net())).run(grid).arrays)


def lost(message: Message, reply: Message) -> Message:
    """What was answered does not arrive."""
    del reply
    return failure_reply(message, FailureCode.CLIENT_LOST)


def asked(message: Message) -> int:
    return int(str(config_of(message.content)[ROUND]))


class TestEpochs:
    def test_one_set_up_serves_its_rounds(self) -> None:
        """Keys are set up once for so many rounds as the run says, and then anew."""
        records, grid = ran(masked(rounds=7, secagg={"epoch_rounds": 3}))
        assert epochs(records) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1)]
        assert kinds(grid, "site-00").count("deposit") == 3
        assert all(record.survivors == grid.names for record in records)

    def test_a_new_set_up_rides_on_the_last_rounds_messages(self) -> None:
        """But for the first, set-ups cost no messages of their own: their steps stand beside those of a round."""
        _, grid = ran(masked(rounds=6, secagg={"epoch_rounds": 3}))
        steps, sent = kinds(grid, "site-00"), [m for m in grid.sent if m.metadata.dst_node_id == FIRST]
        assert steps.count("advertise") == 2
        setup = steps.index("train")
        assert len(sent) == setup + 6 * 3
        assert len(steps) == 2 * setup + 6 * 3

    def test_rides_for_those_who_are_out_as_well(self) -> None:
        """Who is not in the epoch is asked the next set-up's steps beside it, and joins."""
        config = masked(rounds=4, secagg={"epoch_rounds": 2})
        records, _ = ran(config, faults=lambda n, _, r: FORGET if (n, r) == ("site-02", 1) else None)
        assert [record.failures for record in records] == [{"site-02": ABSENT}, {"site-02": ABSENT}, {}, {}]
        assert epochs(records) == [(1, 1), (1, 2), (2, 1), (2, 2)]

    def test_a_sampled_cohort_has_an_epoch_of_its_own(self) -> None:
        """Where another cohort is drawn each round, its members set up keys for that round."""
        records, grid = ran(masked(rounds=3, cohort={"size": 4}), clients=7)
        assert epochs(records) == [(1, 1), (2, 1), (3, 1)]
        assert all(len(record.survivors) == 4 for record in records)
        assert {(name, r.server_round) for r in records for name in r.cohort} == set(grid.trained)

    def test_who_lost_its_memory_joins_the_next_epoch(self) -> None:
        """A client that was restarted is not asked again before keys are set up anew, and then takes part."""
        config = masked(rounds=6, secagg={"epoch_rounds": 4})
        records, grid = ran(config, faults=lambda n, _, r: FORGET if (n, r) == ("site-02", 2) else None)
        assert [record.failures for record in records] == [{}, *[{"site-02": ABSENT}] * 3, {}, {}]
        assert [r for name, r in grid.trained if name == "site-02"] == [1, 5, 6]

    def test_who_was_away_at_the_set_up_is_out_until_the_next(self) -> None:
        """A client that does not answer a set-up has that on record, and is not in the epoch."""
        config = masked(rounds=3, secagg={"epoch_rounds": 2})
        records, _ = ran(config, faults=lambda n, k, r: VANISH if (n, k, r) == ("site-02", "deposit", 1) else None)
        assert [record.failures for record in records] == [
            {"site-02": FailureCode.DEADLINE_EXCEEDED.slug},
            {"site-02": ABSENT},
            {},
        ]

    def test_ends_where_too_few_are_left(self) -> None:
        """With fewer members left than a sum needs, keys are set up anew within the same round."""
        lost = {f"site-{i:02d}" for i in range(3)}
        config = masked(rounds=4, secagg={"epoch_rounds": 8})
        records, _ = ran(config, faults=lambda n, k, r: FORGET if n in lost and (k, r) == ("train", 2) else None)
        assert epochs(records) == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert [len(record.survivors) for record in records] == [5, 0, 5, 5]

    def test_without_enough_clients_there_is_no_sum(self) -> None:
        """Nobody is asked for an update where a set-up has too few members; the reasons are on record."""
        grid, log = Members(masked(), 5, faults=lambda n, *_: VANISH if n > "site-01" else None), Log()
        with pytest.raises(RunError, match="no client sent an update"):
            coordinate(masked(), grid, observer=log)
        assert grid.trained == []
        late = FailureCode.DEADLINE_EXCEEDED.slug
        assert log.failures[0] == {name: ABORTED if name <= "site-01" else late for name in grid.names}

    def test_is_refused_before_it_starts(self) -> None:
        """A run whose sums would need more clients than there are is refused before anybody is asked."""
        check_clients(masked(), 3)
        with pytest.raises(ConfigError, match="too few for a sum"):
            check_clients(masked(), 2)
        with pytest.raises(ConfigError, match="groups"):
            check_clients(masked(strategy={"name": "krum", "malicious_clients": 1}, secagg={"group_size": 3}), 14)

    def test_needs_the_sites_records(self) -> None:
        """A coordinator that knows nobody's keys does not begin."""
        with pytest.raises(ConfigError, match="pinned records"):
            Coordinator(Job(config=masked(), model=Net()))


class TestGivenUp:
    """A round that could not be opened."""

    @pytest.mark.parametrize("fault", [VANISH, lost], ids=["before", "after"])
    def test_is_burnt_before_the_next(self, fault: Fault) -> None:
        """Those who were asked state that it is given up, and then train from the same model again; whether they were
        lost before or after they masked an update.
        """
        gone = {"site-00", "site-01", "site-02"}
        config = masked(rounds=2)
        records, grid = ran(config, faults=lambda n, k, r: fault if n in gone and (k, r) == ("train", 1) else None)
        assert set(records[0].failures) == set(grid.names)
        assert [r for name, r in grid.trained if name == "site-04"] == [1, 2]
        assert kinds(grid, "site-04").count("burn") == 1
        (first, second) = grid.journals["site-04"].written
        assert first.base == second.base
        assert len(records[1].survivors) == 5

    def test_moves_the_model_where_it_cannot_be_burnt(self) -> None:
        """A round that was agreed on but not opened is never burnt: the model is moved by the smallest step, and
        nobody's update of the very same model is asked for twice.
        """
        config = masked(rounds=2)
        records, grid = ran(config, faults=lambda n, k, r: VANISH if (k, r) == ("unmask", 1) else None)
        assert set(records[0].failures.values()) == {ABORTED}
        (first, second) = grid.journals["site-04"].written
        assert first.base != second.base
        assert len(records[1].survivors) == 5

    def test_moved_model_is_almost_the_same(self) -> None:
        """One weight is the next larger number; everything else is what it was."""
        model = start()
        changed = summed.moved(model)
        different = [name for name in model if not np.array_equal(model[name], changed[name])]
        assert len(different) == 1
        (name,) = different
        assert np.sum(model[name] != changed[name]) == 1
        assert np.nextafter(model[name].flat[0], np.float32(9)) == changed[name].flat[0]
        with pytest.raises(RunError, match="only once"):
            summed.moved({"count": np.ones(3, np.int64)})

    def test_sum_that_changes_nothing(self) -> None:
        """Where an opened sum left the model as it was, the next round begins from a model that was moved."""
        records, grid = ran(masked(rounds=3), change=lambda *_: 0.0)
        assert all(record.survivors == grid.names for record in records)
        assert len({use.base for use in grid.journals["site-00"].written}) == 3


class TestGroups:
    CONFIG = masked(rounds=4, strategy={"name": "fedmedian"}, secagg={"group_size": 4, "honest": 2, "epoch_rounds": 2})

    def test_each_has_its_sum(self) -> None:
        """Every group is a sum of its own; who is with whom is drawn anew each epoch."""
        records, grid = ran(self.CONFIG, clients=13)
        for record in records:
            assert record.aggregation is not None
            assert sorted(group.survivors for group in record.aggregation.groups) == [4, 4, 5]
            assert record.survivors == grid.names
        met = {
            use.participants
            for name in grid.names
            for use in grid.journals[name].written
            if "site-00" in use.participants
        }
        assert len(met) == 2

    @pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"])
    def test_robust_strategies_see_the_groups_means(self, name: str) -> None:
        """One client that sends as much as clipping lets it spoils one group's mean, which the strategy leaves out."""
        options = {**STRATEGIES[name], **({"clients_to_keep": 3} if name == "multikrum" else {})}
        config = masked(
            rounds=1, strategy={"name": name, **options}, secagg={"group_size": 3, "honest": 2, "colluding": 1}
        )

        def change(client: str, _: int) -> float:
            return 50.0 if client == "site-07" else 0.5

        grid = Members(config, 21, change=change)
        outcome = coordinate(config, grid)
        moved = outcome.arrays["layer.weight"] - start()["layer.weight"]
        assert np.allclose(moved, 0.5, atol=1e-3)

    def test_mean_strategies_see_the_mean_of_all(self) -> None:
        """FedAvg over groups is FedAvg over everybody: groups count by their weights."""
        config = masked(rounds=1, secagg={"group_size": 4, "honest": 2})
        grid = Members(config, 13)
        outcome = coordinate(config, grid)
        mean = np.mean([grid.updates[name] for name in grid.names], axis=0)
        moved = outcome.arrays["layer.weight"] - start()["layer.weight"]
        assert np.allclose(moved, mean[-1], atol=1e-4)

    def test_too_few_groups_leave_the_model(self) -> None:
        """A strategy counts groups, not clients: with too few opened sums the model stays, and the run goes on."""
        strategy = {"name": "krum", "malicious_clients": 0}
        config = masked(rounds=2, strategy=strategy, secagg={"group_size": 4, "honest": 2})

        def first_group_lost(message: Message, reply: Message) -> Message:
            step = from_record(message.content[SECAGG])[ROUND_STEP]  # type: ignore[arg-type]
            return lost(message, reply) if 0 in Train.from_bytes(step.tobytes()).participants else reply

        grid, log = Members(config, 13), Log()
        grid.faults = lambda _, kind, server_round: first_group_lost if (kind, server_round) == ("train", 1) else None
        outcome = coordinate(config, grid, observer=log)
        first, second = (record.aggregation for record in log.records)
        assert first is not None
        assert second is not None
        assert sum(group.survivors > 0 for group in first.groups) == 2
        assert [record.train_loss is None for record in log.records] == [True, False]
        assert all(group.survivors for group in second.groups)
        assert outcome.rounds == 2

    def test_one_that_is_out_of_range_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sum that no admissible updates have is nobody's: its members' round is aborted, the others' counts, and the
        next round draws new groups.
        """
        spoilt: list[int] = []
        decode = summed.codec_for

        class Refusing:
            def __init__(self, codec: Any) -> None:
                self._codec = codec

            def __getattr__(self, name: str) -> Any:
                return getattr(self._codec, name)

            def decode(self, total: Any, survivors: int) -> Any:
                spoilt.append(survivors)
                if len(spoilt) == 2:
                    raise SecAggError("range")
                return self._codec.decode(total, survivors)

        monkeypatch.setattr(summed, "codec_for", lambda *a, **k: Refusing(decode(*a, **k)))
        records, grid = ran(masked(rounds=2, secagg={"group_size": 4, "honest": 2, "epoch_rounds": 8}), clients=13)
        groups = records[0].aggregation.groups if records[0].aggregation else []
        assert [group.refused for group in groups] == ["", "range", ""]
        assert len(records[0].failures) == groups[1].asked
        assert set(records[0].failures.values()) == {ABORTED}
        assert epochs(records) == [(1, 1), (2, 1)]
        assert records[1].survivors == grid.names

    def test_missing_reveal_is_mended_without_its_client(self) -> None:
        """Who commits to a nonce and does not reveal it aborts the set-up; it is made again without that client."""
        records, grid = ran(
            self.CONFIG.model_copy(update={"rounds": 1}),
            clients=13,
            faults=lambda n, k, _: VANISH if (n, k) == ("site-05", "reveal") else None,
        )
        assert records[0].survivors == [name for name in grid.names if name != "site-05"]

    def test_client_that_never_reveals_does_not_end_the_run_of_all(self) -> None:
        """Members give up few set-ups a day: after two that it spoilt a client is left out."""
        records, grid = ran(
            self.CONFIG.model_copy(update={"rounds": 6}),
            clients=13,
            faults=lambda n, k, _: VANISH if (n, k) == ("site-05", "reveal") else None,
        )
        assert all(len(record.survivors) == 12 for record in records)
        assert grid.journals["site-00"].aborts_today() == 2


class TestDistributedNoise:
    def test_reaches_nothing_but_what_is_trained(self) -> None:
        """Noise lies on every value of a sum: buffers and frozen weights stay what they were, to the bit."""
        config = masked(rounds=2, privacy={"unit": "client", "noise_multiplier": 1.0, "clipping_norm": 2.0})
        values = sum(array.size for array in start().values() if array.dtype.kind == "f")
        plan = plan_of(config, 5, dimensions=values)
        grid = Members(config, 5, change=lambda *_: 0.0, plan=plan)
        outcome = coordinate(config, grid, plan=plan)
        for name, before in start().items():
            assert np.array_equal(outcome.arrays[name], before) is (name not in TRAINABLE)


class TestStrategies:
    @pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
    def test_of_the_mean_step_as_without_masks(self, name: str) -> None:
        """Every strategy of the mean takes the step that it takes without secure aggregation, up to the rounding."""
        config = masked(rounds=3, strategy={"name": name, **STRATEGIES[name]})
        outcome, plain = coordinate(config, Members(config, 5)), clear(config, 5)
        for key, values in outcome.arrays.items():
            assert np.allclose(values, plain[key], atol=1e-5 if name in {"fedavg", "fedprox", "fedavgm"} else 1e-3)
