"""Whole runs under secure aggregation end where plain ones end, up to a stated rounding, and the same everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.aggregation import codec_for
from common.config import RunConfig, load_config
from common.errors import ConfigError, FailureCode, RunError
from common.models.weights import ModelWeights
from common.secagg.fixed_point import MOST_METRIC, FixedPoint
from simulations.run import Prepared, execute, prepare
from tests.helpers.runs import SITE, STRATEGIES, Log, as_bytes, configuration, prepared, run

FLOAT32 = 2.0**-22
"""For what the plain mean and the model's own numbers round, relative to the largest weight: four halves of 2^-23."""
BITS = [16, 20, 24, 32]


def secure(**changes: Any) -> RunConfig:
    """`tiny` on `blobs` under secure aggregation."""
    privacy = {"secure_aggregation": True, **changes.pop("privacy", {})}
    return configuration(privacy=privacy, **changes)


def plain(config: RunConfig) -> RunConfig:
    """The same run, and everybody sees every update."""
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"secure_aggregation": False})})


def trained(folder: Path, config: RunConfig, **how: Any) -> dict[str, NDArray[Any]]:
    """The model that a run ends with."""
    folder.mkdir()
    return dict(execute(prepared(folder, config), **how).arrays)


def bound_of(config: RunConfig, possible: Prepared, *, weight: float) -> float:
    """What the codec says that one round's mean can be off by."""
    members = len(possible.federation.clients)
    template = ModelWeights(possible.model).copy()
    codec = codec_for(config, template, participants=members, plan=None, server_round=1)
    assert isinstance(codec, FixedPoint)
    return codec.bound(members, weight)


def furthest(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> float:
    """The largest difference of any two values."""
    assert set(one) == set(other)
    return max(float(np.abs(one[name].astype(float) - other[name].astype(float)).max()) for name in one)


class TestOneRound:
    @pytest.mark.parametrize("bits", BITS)
    def test_is_the_plain_mean_within_the_stated_bound(self, bits: int, tmp_path: Path) -> None:
        """Equal weights. The bound is no idle one: more than a hundredth of it is used, where float32 allows it."""
        config = secure(rounds=1, strategy={"weighting": "equal"}, secagg={"bits": bits})
        found, expected = trained(tmp_path / "sum", config), trained(tmp_path / "plain", plain(config))
        bound = bound_of(config, prepared(tmp_path / "again", config), weight=4)
        largest = max(float(np.abs(values).max()) for values in expected.values())
        off = furthest(found, expected)
        assert off <= bound + FLOAT32 * largest
        assert off > bound / 100 or bits == 32

    @pytest.mark.parametrize("bits", [24, 32])
    def test_examples_weigh_as_in_the_plain_mean(self, bits: int, tmp_path: Path) -> None:
        """12, 15, 18 and 21 examples, counted inside the sum."""
        config = secure(rounds=1, secagg={"bits": bits, "most_weight": 32})
        found, expected = trained(tmp_path / "sum", config), trained(tmp_path / "plain", plain(config))
        equal = trained(tmp_path / "equal", secure(rounds=1, strategy={"weighting": "equal"}))
        bound = bound_of(config, prepared(tmp_path / "again", config), weight=12 + 15 + 18 + 21)
        largest = max(float(np.abs(values).max()) for values in expected.values())
        assert furthest(found, expected) <= bound + FLOAT32 * largest < furthest(found, equal)

    def test_the_training_loss_rides_in_the_sum(self, tmp_path: Path) -> None:
        """The record shows its mean by weight, as without masks, up to one step of the ring for each of the four."""
        config = secure(rounds=1)
        _, log = run(tmp_path / "sum", config)
        _, open_log = run(tmp_path / "plain", plain(config))
        told, expected = log.records[0].train_loss, open_log.records[0].train_loss
        assert told is not None
        assert expected is not None
        step = config.secagg.most_weight * MOST_METRIC / (2**31 // 4 - 2)
        assert told == pytest.approx(expected, abs=4 * step / (12 + 15 + 18 + 21))

    def test_updates_longer_than_the_norm_are_clipped(self, tmp_path: Path) -> None:
        """So that no sum leaves the ring, whatever a client learnt."""
        config = secure(rounds=1, strategy={"weighting": "equal"}, secagg={"clipping_norm": 0.01})
        possible = prepared(tmp_path, config)
        start = ModelWeights(possible.model).copy()
        moved = execute(possible).arrays
        length = math.sqrt(sum(float(((moved[name] - start[name]).astype(float) ** 2).sum()) for name in start))
        assert 0 < length <= 0.01 + 1e-6


class TestWholeRun:
    @pytest.mark.parametrize("bits", [20, 32])
    def test_of_heart_ends_close_to_the_plain_one(self, bits: int, tmp_path: Path) -> None:
        """Rounding adds up over the rounds, and no more than that.

        A step of gradient descent on a convex loss, with a rate of at most 2 over its smoothness, brings no two
        starting points further apart; nor does the mean of such steps. So after R rounds the models are at most R
        times as far apart as rounding puts them in one: sqrt(d) times the bound of a coordinate, by L2. Softmax
        regression is convex, and as smooth as half of the largest squared example, its constant one included.
        """
        settings = ["comparison.enabled=false", "privacy.unit=none", "training.learning_rate=0.05"]
        loaded = load_config("heart", [*settings, "privacy.secure_aggregation=true", f"secagg.bits={bits}"])
        config = loaded.config
        possible = prepare(config, folder=tmp_path)
        inputs = [client.train.inputs.double() for client in possible.federation.clients]
        smoothness = max(float((rows**2).sum(dim=1).max()) + 1 for rows in inputs) / 2
        assert config.training.learning_rate <= 2 / smoothness

        secured, open_run = execute(possible), execute(prepare(loaded.plain, folder=tmp_path))
        values = sum(array.size for array in secured.arrays.values())
        steps = sum(-(-len(rows) // config.training.batch_size) for rows in inputs)
        largest = max(float(np.abs(array).max()) for array in open_run.arrays.values())
        allowed = math.sqrt(values) * (
            config.rounds * bound_of(config, possible, weight=4) + config.rounds * steps * FLOAT32 * max(1.0, largest)
        )
        assert furthest(dict(secured.arrays), dict(open_run.arrays)) <= allowed < 0.05
        assert secured.evaluation is not None
        assert open_run.evaluation is not None
        assert secured.evaluation.accuracy == pytest.approx(open_run.evaluation.accuracy, abs=0.02)

    @pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
    def test_any_strategy_of_the_mean_works_on_sums(self, name: str, tmp_path: Path) -> None:
        """Flower's own, unmodified: with 32 bits the models are as good as equal."""
        config = secure(strategy={"name": name, **STRATEGIES[name], "weighting": "equal"})
        found, expected = trained(tmp_path / "sum", config), trained(tmp_path / "plain", plain(config))
        assert furthest(found, expected) <= 1e-3

    def test_a_new_epoch_begins_when_one_is_over(self, tmp_path: Path) -> None:
        """The model does not depend on how many rounds a set-up serves."""
        models = []
        for rounds in (1, 2, 16):
            config = secure(rounds=5, secagg={"epoch_rounds": rounds}, strategy={"weighting": "equal"})
            outcome, log = run(tmp_path / str(rounds), config)
            kept = [record.aggregation for record in log.records]
            assert all(row is not None and [group.survivors for group in row.groups] == [4] for row in kept)
            assert len({row.epoch for row in kept if row is not None}) == -(-5 // rounds)
            models.append(outcome.arrays)
        assert furthest(models[0], models[1]) <= 1e-5
        assert furthest(models[0], models[2]) <= 1e-5


class TestSameBytes:
    @pytest.mark.parametrize("how", [{"workers": 2}, {"sealed": True}, {"workers": 3, "sealed": True}], ids=str)
    @pytest.mark.parametrize(
        "tables",
        [
            {},
            {"cohort": {"size": 3}, "data": {"clients": 6}},
            {"strategy": {"name": "fedmedian"}, "secagg": {"group_size": 3}, "data": {"clients": 9}},
        ],
        ids=["everybody", "cohorts", "groups"],
    )
    def test_for_any_number_of_workers_sealed_or_not(
        self, tables: dict[str, Any], how: dict[str, Any], tmp_path: Path
    ) -> None:
        """Keys and masks are new each time; what is left without them is the same to the bit.

        Groups are drawn by everybody's own randomness, so that their means differ from run to run: there is one group.
        """
        if tables.get("secagg"):
            tables = {**tables, "secagg": {"group_size": 9}}
        config = secure(**tables)
        expected = as_bytes(trained(tmp_path / "one", config))
        assert as_bytes(trained(tmp_path / "other", config, **how)) == expected


class TestTrouble:
    """Clients that fail are left out of the sum; the others' sum is exact."""

    def test_a_client_that_fails_every_round_is_left_out(self, tmp_path: Path) -> None:
        """With its reason; the result is that of the plain run, in which it fails as well."""
        tables = {"data": {"name": "one-in-trouble", "clients": 5}, "model": {"options": {"trouble": "raise"}}}
        config = secure(**tables, strategy={"weighting": "equal"})
        outcome, log = run(tmp_path / "sum", config)
        expected, _ = run(tmp_path / "plain", plain(config))
        assert furthest(dict(outcome.arrays), dict(expected.arrays)) <= 1e-5
        others = [f"client-{i:02d}" for i in (0, 2, 3, 4)]
        assert [record.survivors for record in log.records] == [others] * 3
        assert log.failures == [{"client-01": FailureCode.CLIENT_FAILED.slug}] * 3

    def test_an_update_that_is_not_finite_counts_for_nothing_and_is_not_told(self, tmp_path: Path) -> None:
        """A coordinator does not learn on whose examples training overflows; the mean is that of the others."""
        tables = {"data": {"name": "one-in-trouble", "clients": 5}, "model": {"options": {"trouble": "nan"}}}
        config = secure(**tables, strategy={"weighting": "equal"})
        outcome, log = run(tmp_path / "sum", config)
        expected, open_log = run(tmp_path / "plain", plain(config))
        assert furthest(dict(outcome.arrays), dict(expected.arrays)) <= 1e-5
        assert log.failures == [{}] * 3
        assert open_log.failures == [{"client-01": FailureCode.NON_FINITE_UPDATE.slug}] * 3

    @pytest.mark.parametrize("trouble", ["hang", "exit", "kill"])
    def test_a_client_that_vanishes_is_left_out(self, trouble: str, tmp_path: Path) -> None:
        """It hangs until the deadline, or takes its process with it."""
        config = secure(
            data={"name": "one-in-trouble", "clients": 5}, model={"options": {"trouble": trouble}},
            cohort={"deadline_seconds": 3.0}, rounds=2,
        )  # fmt: skip
        _, log = run(tmp_path / "sum", config, workers=2)
        reason = FailureCode.DEADLINE_EXCEEDED if trouble == "hang" else FailureCode.CLIENT_LOST
        assert log.records[0].failures == {"client-01": reason.slug}
        assert all("client-01" not in record.survivors for record in log.records)
        assert any(len(record.survivors) == 4 for record in log.records)

    def test_too_few_survivors_make_no_sum(self, tmp_path: Path) -> None:
        """Three sites can lose none; what two of them learnt is told to nobody, and the run says so."""
        config = secure(data={"name": "one-in-trouble", "clients": 3}, model={"options": {"trouble": "raise"}})
        log = Log()
        with pytest.raises(RunError, match="no client sent an update"):
            run(tmp_path / "sum", config, observer=log)
        assert all(record.survivors == [] for record in log.records)
        refused = [group.refused for record in log.records if record.aggregation for group in record.aggregation.groups]
        assert refused
        assert all(refused)


def test_only_runs_that_ask_for_it_are_masked(tmp_path: Path) -> None:
    """Without the setting nothing changes, and nothing is said of sums."""
    _, log = run(tmp_path / "plain", configuration())
    assert [record.aggregation for record in log.records] == [None] * 3


def test_too_few_clients_are_refused_before_the_start(tmp_path: Path) -> None:
    """Not in the first round, and with the number that is needed."""
    with pytest.raises(ConfigError):
        prepare(secure(data={"clients": 2}), folder=tmp_path, site_file=SITE)


def test_a_watcher_is_told_of_each_update_when_it_arrives_and_of_its_fate_at_the_end(tmp_path: Path) -> None:
    """So that a display moves while clients train."""

    class Watching(Log):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[str, str]] = []

        def update_received(self, client: str) -> None:
            self.told.append(("update", client))

        def reply_received(self, client: str, failure: Any) -> None:
            self.told.append(("fate", client))

    watching = Watching()
    run(tmp_path / "sum", secure(rounds=1), observer=watching)
    names = [f"client-{i:02d}" for i in range(4)]
    assert watching.told[:4] == [("update", name) for name in names]
    assert sorted(watching.told[4:]) == [("fate", name) for name in names]
