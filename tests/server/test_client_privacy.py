"""Runs under client-level privacy: what one client can do, what travels, and what is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from common.config import RunConfig
from common.errors import BudgetExhaustedError, PrivacyError, RunError
from common.flower import CLIPPING_NORM, CONFIG, METRICS, WEIGHT, WITHIN
from common.privacy import FileLedger
from server import coordinator as coordinator_module
from server.strategies import replies_needed
from tests.helpers.releasing import (
    ADAPTIVE,
    CLIENTS,
    FLAT,
    KINDS,
    MATRIX,
    POISSON,
    TRAINABLE,
    MemoryLedger,
    client_private,
    coordinate,
    fixed_noise,
    flat,
    plan_of,
    sites,
    start,
)
from tests.helpers.runs import STRATEGIES, Log, run

MEAN = [name for name in STRATEGIES if replies_needed(name) == "mean"]
every_kind = pytest.mark.parametrize("kind", KINDS)


class TestStrategies:
    @pytest.mark.parametrize("name", MEAN)
    def test_that_take_the_mean_work_on_top(self, name: str) -> None:
        """Every such strategy steps each round from the released mean alone; the model stays finite and its dtypes."""
        config = client_private(strategy={"name": name, **STRATEGIES[name]})
        log = Log()
        outcome = coordinate(config, sites(config), noise=fixed_noise(), observer=log)
        assert [(r.aggregate_refused, r.failures, r.train_loss) for r in log.records] == [(False, {}, None)] * 4
        assert {n: v.dtype for n, v in outcome.arrays.items()} == {n: v.dtype for n, v in start().items()}
        assert not np.array_equal(flat(outcome.arrays), flat(start()))

    def test_fedavg_steps_by_the_noised_mean(self) -> None:
        """Without noise the model moves by the mean of the clipped updates, up to the grid."""
        config = client_private(rounds=1)
        outcome = coordinate(config, sites(config, change=lambda name, *_: 0.1 if name == "node-2" else 50.0))
        expected = (0.1 + 5 * 2 / 8**0.5) / 6
        np.testing.assert_allclose(flat(outcome.arrays) - flat(start()), expected, rtol=1e-4)


class TestOneClient:
    @pytest.mark.parametrize("sent", [1e3, -1e30, np.nan, np.inf, "absent"])
    def test_moves_the_model_by_no_more_than_its_share(self, sent: Any) -> None:
        """Whatever it sends for one round, the model without noise ends within norm / cohort of where it ends without
        that client.
        """
        config = client_private(rounds=1)
        ends = []
        for value in ("absent", sent):
            grid = sites(
                config,
                change=lambda name, *_, value=value: 0.05 if name != "node-4" or value == "absent" else value,
                absent=lambda name, _, value=value: name == "node-4" and value == "absent",
            )
            ends.append(flat(coordinate(config, grid).arrays))
        assert np.linalg.norm(ends[1] - ends[0]) <= 2.0 / 6 + 1e-4

    def test_is_on_record_when_its_update_is_no_number(self) -> None:
        """The failure is named, and the others' round goes on."""
        config, log = client_private(rounds=1), Log()
        coordinate(config, sites(config, change=lambda name, *_: np.nan if name == "node-3" else 0.1), observer=log)
        assert log.failures == [{"node-3": "non-finite-update"}]
        assert len(log.records[0].survivors) == 5

    @pytest.mark.parametrize("extra", [{"train_loss": 0.5}, {WITHIN: 1.0}, {"norm": 2.0}])
    def test_tells_nothing_beside_its_update(self, extra: dict[str, float]) -> None:
        """A reply with another metric than the plan's is refused as a whole."""
        config, log = client_private(rounds=1), Log()
        grid = sites(config)
        honest = grid._answers

        def answers(messages: list[Message]) -> Any:
            for reply in honest(messages):
                if reply.metadata.src_node_id == 5:
                    for key, value in extra.items():
                        reply.content[METRICS][key] = value
                yield reply

        grid._engine._answer = answers
        coordinate(config, grid, observer=log)
        assert log.failures == [{"node-5": "invalid-reply"}]

    def test_has_to_say_whether_it_was_within_where_the_norm_adapts(self) -> None:
        """Under adaptive clipping a reply without that bit, or with a weight, is refused."""
        log = Log()
        with pytest.raises(RunError, match="no client sent an update"):
            coordinate(ADAPTIVE, sites(ADAPTIVE, within=None), observer=log)
        assert log.failures[0] == {f"node-{i}": "invalid-reply" for i in range(2, 8)}


class TestWhoAnswers:
    def test_decides_neither_divisor_nor_whether_there_is_a_round(self) -> None:
        """With one answer out of 6 the model still steps, by the sum over 6."""
        config = client_private(rounds=1)
        outcome = coordinate(config, sites(config, absent=lambda name, _: name != "node-2", change=lambda *_: 0.12))
        np.testing.assert_allclose(flat(outcome.arrays) - flat(start()), 0.02, rtol=1e-3)

    def test_may_be_nobody(self) -> None:
        """Rounds in which everybody is away are noised and used like others."""
        ledger, log = MemoryLedger(), Log()
        grid = sites(FLAT, absent=lambda _, server_round: server_round > 1)
        outcome = coordinate(FLAT, grid, ledger=ledger, noise=fixed_noise(), observer=log)
        short = client_private(rounds=1, privacy={"noise_multiplier": 1.0})
        first = coordinate(short, sites(short), noise=fixed_noise(), plan=plan_of(FLAT, CLIENTS))
        assert [len(record.survivors) for record in log.records] == [6, 0, 0, 0]
        assert np.abs(flat(outcome.arrays) - flat(first.arrays)).min() > 0
        assert ledger.log == [f"reserve {t}" for t in (1, 2, 3, 4)]

    def test_may_be_nobody_because_nobody_was_asked(self) -> None:
        """An empty Poisson cohort has its noise and its event."""

        class Nobody:
            def sample(self, server_round: int, clients: Any) -> list[str]:
                return [] if server_round == 2 else sorted(clients)[:3]

            def state(self) -> dict[str, int]:
                return {}

            def restore(self, state: Any) -> None: ...

        ledger, log, grid = MemoryLedger(), Log(), sites(POISSON)
        ends: list[Any] = []
        original = coordinator_module.aggregate

        def seen(strategy: Strategy, server_round: int, replies: Any) -> Any:
            result = original(strategy, server_round, replies)
            ends.append(flat({name: array.numpy() for name, array in (result[0] or {}).items()}))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coordinator_module, "aggregate", seen)
            coordinate(POISSON, grid, ledger=ledger, noise=fixed_noise(), observer=log, sampler=Nobody())
        assert [record.cohort for record in log.records][1] == []
        assert ledger.log == [f"reserve {t}" for t in (1, 2, 3, 4)]
        assert np.abs(ends[1] - ends[0]).min() > 0
        assert {server_round for _, server_round in grid.asked} == {1, 3, 4}
        assert len(grid.timeouts) == 3, "the transport is not bothered with an empty cohort"

    def test_is_drawn_anew_in_poisson_cohorts(self) -> None:
        """Whole runs over cohorts of random size end with a model and an event a round."""
        cohorts = set()
        for _ in range(5):
            ledger, log = MemoryLedger(), Log()
            coordinate(POISSON, sites(POISSON), ledger=ledger, observer=log)
            assert len(ledger.events()) == len(log.records) == 4
            cohorts |= {tuple(record.cohort) for record in log.records}
        assert len({len(cohort) for cohort in cohorts}) > 1, "20 cohorts of one size: less than once in 10^8 runs"


class TestWhatTravels:
    def test_the_clipping_norm_travels_and_adapts(self) -> None:
        """Each round's messages carry the present norm; the record tells it, and the noised share within."""
        log, grid = Log(), sites(ADAPTIVE)
        coordinate(ADAPTIVE, grid, noise=fixed_noise(), observer=log)
        sent = [message.content[CONFIG][CLIPPING_NORM] for message in grid.sent[::CLIENTS]]
        assert log.failures == [{}] * 4
        assert sent[0] == 2.0
        assert sent == [record.clipping_norm for record in log.records]
        assert len(set(sent)) == 4
        assert all(record.within is not None for record in log.records)

    def test_other_runs_know_of_no_norm(self) -> None:
        """With flat clipping the norm is the plan's and no share is told."""
        log = Log()
        coordinate(FLAT, sites(FLAT), observer=log)
        assert {(record.clipping_norm, record.within) for record in log.records} == {(2.0, None)}

    def test_what_is_not_trained_stays(self) -> None:
        """Frozen parameters, running statistics and counters end as they began, without noise."""
        outcome = coordinate(FLAT, sites(FLAT), noise=fixed_noise())
        for name, values in start().items():
            assert np.array_equal(outcome.arrays[name], values) is (name not in TRAINABLE)

    def test_strategies_see_one_reply_of_weight_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Above the grid there are no clients any more."""
        seen: list[Message] = []
        original = coordinator_module.aggregate

        def spy(strategy: Strategy, server_round: int, replies: Any) -> Any:
            seen.extend(reply for reply in replies if reply.has_content())
            return original(strategy, server_round, replies)

        monkeypatch.setattr(coordinator_module, "aggregate", spy)
        coordinate(FLAT, sites(FLAT))
        assert [dict(reply.content[METRICS]) for reply in seen] == [{WEIGHT: 1.0}] * 4


class TestRefusal:
    def test_spent_budget_ends_the_run_with_the_model_so_far(self) -> None:
        """The round after the last that can be paid for is not released."""
        log = Log()
        outcome = coordinate(POISSON, sites(POISSON), ledger=MemoryLedger(most=2), observer=log)
        assert len(log.records) == outcome.rounds == 2
        assert outcome.stopped_early

    def test_without_budget_for_any_round_there_is_no_model(self) -> None:
        """The error says why."""
        with pytest.raises(BudgetExhaustedError, match="the budget is spent"):
            coordinate(FLAT, sites(FLAT), ledger=MemoryLedger(most=0))

    def test_no_plan_no_run(self) -> None:
        """A configuration that asks for privacy is not run without a plan."""
        with pytest.raises(PrivacyError, match="no plan"):
            coordinate(FLAT, sites(FLAT), plan=None)

    @pytest.mark.parametrize(
        ("config", "fewer"), [(MATRIX, 4), (MATRIX.model_copy(update={"rounds": 5}), 6), (POISSON, 7)]
    )
    def test_fewer_clients_than_planned_do_not_start(self, config: RunConfig, fewer: int) -> None:
        """With fewer clients each would be asked more often, sooner again, or with a higher probability, than was
        counted; with more, less.
        """
        grid = sites(config, clients=fewer)
        with pytest.raises(RunError, match=f"only {fewer} clients"):
            coordinate(config, grid, plan=plan_of(config, 8))
        assert grid.asked == []
        coordinate(config, sites(config, clients=10), plan=plan_of(config, 8))


class TestRealClients:
    @pytest.mark.parametrize("clipping", ["flat", "adaptive"])
    def test_train_and_clip(self, clipping: str, tmp_path: Path) -> None:
        """Real clients answer within the bound: the record holds no failure, and the model has moved."""
        privacy = {"clipping_norm": 0.5, "clipping": clipping}
        outcome, log = run(tmp_path / "run", client_private(privacy=privacy, rounds=2))
        assert log.failures == [{}, {}]
        assert all(len(record.survivors) == 4 for record in log.records)
        assert [record.within is not None for record in log.records] == [clipping == "adaptive"] * 2
        assert outcome.evaluation is not None


class TestRealLedger:
    @pytest.mark.parametrize("config", [FLAT, ADAPTIVE, MATRIX, POISSON], ids=[*KINDS, "poisson"])
    def test_run_within_its_budget_is_paid_for(self, config: RunConfig, tmp_path: Path) -> None:
        """With a ledger on disk that allows exactly what the plan costs, the run reaches its last round."""
        plan = plan_of(config, CLIENTS)
        ledger = FileLedger(
            tmp_path / "coordinator.jsonl", counter=tmp_path / "counters" / "c.json", budget=plan.budget, unit="client"
        )
        outcome = coordinate(config, sites(config), ledger=ledger, noise=fixed_noise())  # type: ignore[arg-type]
        assert outcome.rounds == config.rounds
        assert len(ledger.events()) == config.rounds
